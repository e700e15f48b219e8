"""The `[data]` table: where samples come from and how they become streams."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from vlm.config.options import Options
from vlm.data.streams.number_options import NumberStream, TokenWeights
from vlm.data.streams.options import (
    ClassTexts,
    ConversationStream,
    DiffusionNoise,
    MaskedPixels,
    SceneGraphSwap,
    StreamOptions,
    check_streams,
)
from vlm.runtime.pictures import PictureLimits
from vlm.runtime.templates import TEMPLATES


class Columns(Options):
    """Which fields hold the picture and the text. `auto`: the first there is of `image`, `picture`,
    `file_name`, `filepath` and `image_path`, and of `txt`, `caption`, `text` and `title`.

    A further key is a name that a stream reads (`answer.preferred`), its value the field that holds it.
    """

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, str]

    image: str = Field("auto", description="field with the picture, or auto")
    text: str = Field(
        "auto", description="field with the text, dotted for nested ones (captions.de), or auto"
    )


class ImageOptions(Options):
    """What training does to a picture before the model's own preprocessing."""

    augment: Literal["none", "random-resized-crop"] = Field(
        "none", description="what to vary from epoch to epoch"
    )
    scale: tuple[float, float] = Field(
        (0.5, 1.0), description="share of the area that a random crop keeps, from, to"
    )
    ratio: tuple[float, float] = Field(
        (0.75, 4 / 3), description="width over height of a random crop, from, to"
    )
    flip: bool = Field(
        False, description="mirror left and right half of the time (texts may say left and right)"
    )
    tiles: bool = Field(
        True, description="cut pictures as the model's tiler says; false: each is read as a picture of one tile"
    )

    @model_validator(mode="after")
    def _ordered(self) -> ImageOptions:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {list(self.scale)}, expected 0 < from <= to <= 1")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {list(self.ratio)}, expected 0 < from <= to")
        self.read_only_where(self.augment == "random-resized-crop", 'augment = "random-resized-crop"', "scale", "ratio")
        return self


class TextOptions(Options):
    """How texts become ids."""

    length: int = Field(
        32,
        ge=2,
        le=1_048_576,
        description="tokens of a text; a longer one is cut, keeping eos. Of a conversation: positions, pictures expanded",
    )
    captions: int | None = Field(
        None,
        ge=2,
        le=1_048_576,
        description="beside conversations: tokens of a caption, which then is the stream text too, for another model; none: no captions there",
    )
    template: str | None = Field(
        None, description="how messages are written: plain, vicuna, llama3 or chatml; none: as the model says, else plain"
    )

    @model_validator(mode="after")
    def _known(self) -> TextOptions:
        if self.template is not None and self.template not in TEMPLATES:
            raise ValueError(f"unknown template {self.template!r}, expected one of {', '.join(TEMPLATES)}")
        return self


class OneCaption(Options):
    """One text a sample, the first of a list."""

    kind: Literal["one"] = "one"


class RandomCaption(Options):
    """One of several texts, drawn for each sample and epoch."""

    kind: Literal["random"] = "random"
    columns: tuple[str, ...] = Field(
        (), description="fields to choose among; none: the entries of the text column"
    )


class SentenceCaptions(Options):
    """k sentences of long texts, drawn for each sample and epoch: rows of `text`, numbered by `slot`. Source: dreamlip."""

    kind: Literal["sentences"] = "sentences"
    k: int = Field(2, ge=1, le=64, description="sentences to draw")
    raw: str | None = Field(
        None, description="field with the caption the picture came with: slot 0 before the sentences"
    )
    columns: tuple[str, ...] = Field((), description="fields with long texts; none: the text column")
    split: tuple[str, ...] = Field((".", "!", "?", "\n"), min_length=1, description="what ends a sentence")
    merge: int = Field(1, ge=1, description="consecutive sentences joined into one")
    replacement: Literal["never", "when-short", "always"] = Field(
        "never", description="whether a sentence may be drawn twice; never: a short text gives fewer rows"
    )


class SeveralCaptions(Options):
    """Texts of the text column, whole, drawn for each sample and epoch, in their order: rows of `text`, numbered by `slot`."""

    kind: Literal["several"] = "several"
    k: int = Field(5, ge=1, le=64, description="texts of a sample at most")


class MixedCaptions(Options):
    """One text of one field, drawn for each sample and epoch: fields by their weights, the entries of a list alike. Sources:
    realsyn, nevlp."""

    kind: Literal["mix"] = "mix"
    weights: dict[str, float] = Field(
        min_length=1, description="field = how often it is taken; a field that a sample lacks leaves its share to the others"
    )

    @model_validator(mode="after")
    def _positive(self) -> MixedCaptions:
        wrong = [name for name, weight in self.weights.items() if not 0 < weight < float("inf")]
        if wrong:
            raise ValueError(f"weights.{wrong[0]} is {self.weights[wrong[0]]:g}, expected a number above 0")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.weights)


class CaptionsByLength(Options):
    """One text of at least `least` and at most `most` words, drawn for each sample and epoch among those of all fields.
    Source: vladva (short captions are contrasted, long ones are too specific for that)."""

    kind: Literal["length"] = "length"
    columns: tuple[str, ...] = Field((), description="fields to choose among; none: the entries of the text column")
    least: int = Field(1, ge=1, description="words of a text, from")
    most: int = Field(30, ge=1, description="words of a text, to")
    otherwise: Literal["nearest", "refuse"] = Field(
        "nearest", description="where no text fits: the one nearest to the bounds, the first of several, or the sample is bad"
    )

    @model_validator(mode="after")
    def _ordered(self) -> CaptionsByLength:
        if self.least > self.most:
            raise ValueError(f"least is {self.least} and most {self.most}, expected least <= most")
        return self


Captions = Annotated[
    OneCaption | RandomCaption | SentenceCaptions | SeveralCaptions | MixedCaptions | CaptionsByLength, Field(discriminator="kind")
]


class DocumentPacker(Options):
    """One document a row; a longer one goes on in the next row.

    Conversations: as many whole samples to a row as fit one after another, whichever packer; none goes on.
    """

    kind: Literal["document"] = "document"
    length: int = Field(128, ge=2, le=1_048_576, description="tokens of a row")


class ConcatPacker(Options):
    """Documents joined end to end and cut into full rows; `segment` keeps them apart."""

    kind: Literal["concat"] = "concat"
    length: int = Field(128, ge=2, le=1_048_576, description="tokens of a row")


Packer = Annotated[DocumentPacker | ConcatPacker, Field(discriminator="kind")]


class FewShot(Options):
    """The same few samples of each class in every epoch; all of a class that has fewer. Source: coop."""

    kind: Literal["few-shot"] = "few-shot"
    k: int = Field(16, ge=1, le=1_000_000, description="samples of a class, of data.label; fewer shots are a part of more")
    seed: int | None = Field(None, ge=0, description="of the draw; none: train.seed")


Sampler = Annotated[FewShot, Field()]


class BadSamples(Options):
    """What happens to a sample that cannot be used: it is counted and named, and past the budget the run stops."""

    policy: Literal["skip", "stop"] = Field(
        "skip", description="skip within the budget, or stop at the first one"
    )
    budget: float = Field(0.01, ge=0, le=1, description="share of the samples of an epoch that may be bad")

    @model_validator(mode="after")
    def _read(self) -> BadSamples:
        self.read_only_where(self.policy == "skip", 'policy = "skip"', "budget")
        return self

    def allowed(self, samples: int) -> int:
        """How many bad samples an epoch of `samples` may have."""
        return 0 if self.policy == "stop" else int(self.budget * samples + 1e-9)


Where = dict[str, str | tuple[str, ...]]
"""Field -> pattern, or patterns of which one must fit; `*` and `?` as in file names, case counts."""


class MixturePart(Options):
    """One source of a mixture. What is not given is that of the `[data]` table."""

    source: str = Field(description="training data, an address like data.source")
    weight: float = Field(1.0, gt=0, le=1e6, description="share of the samples, relative to the other weights")
    columns: Columns | None = Field(None, description="which fields hold the picture and the text")
    streams: dict[str, StreamOptions] = Field({}, description="streams added or replaced by name")
    where: Where | None = Field(None, description="samples to keep, by field")


class DataOptions(Options):
    """The `[data]` table."""

    source: str = Field("scenes:", description="training data: tar pattern, folder, JSON lines, CSV, scenes:, digits: or clips:")
    val: str | None = Field(None, description="evaluation data, an address like source")
    mixture: dict[str, MixturePart] = Field({}, description="several sources by name, in place of source")
    where: Where = Field({}, description="samples to keep, of source and of val: field = pattern, or patterns of which one must fit")
    exclude: str | None = Field(None, description="file of keys to leave out of the training data, as vlm data overlap writes it")
    columns: Columns = Columns()
    streams: dict[str, StreamOptions] = Field({}, description="further streams of the batch by name")
    group_by: str | None = Field(
        None, description="field (or text) whose equal values are positives of each other: stream group"
    )
    label: str | None = Field(
        None, description="field whose distinct values over the training data are the classes: stream label"
    )
    sampler: Sampler | None = Field(None, description="which samples of the training data are learned from; none: all")
    image: ImageOptions = ImageOptions()
    text: TextOptions = TextOptions()
    captions: Captions = OneCaption()
    packer: Packer | None = Field(
        None, description="how documents become rows of a language model; text-only data"
    )
    workers: int = Field(
        0, ge=0, le=256, description="processes that decode samples; 0: the training process itself"
    )
    prefetch: int = Field(2, ge=1, le=64, description="global batches that workers decode ahead")
    bad_samples: BadSamples = BadSamples()
    max_pixels: int = Field(64 * 2**20, ge=1, le=2**31, description="pixels of a picture, from its header")
    max_bytes: int = Field(32 * 2**20, ge=1, le=2**31, description="bytes of an encoded picture")
    max_text: int = Field(1_000_000, ge=1, le=16 * 2**20, description="characters of a text")

    @model_validator(mode="after")
    def _fit(self) -> DataOptions:
        self.read_only_where(self.workers > 0, "workers is above 0", "prefetch")
        if self.mixture and "source" in self.model_fields_set:
            raise ValueError("source and mixture are two ways to say the same; leave one out")
        if self.packer is not None and self.text.length != TextOptions().length:
            raise ValueError("text.length is not read beside a packer, which has its own: leave it out, and set packer.length")
        if self.sampler is not None and (self.label is None or self.mixture):
            raise ValueError("sampler: a few samples of each class want label, the field with a sample's class, and one source, no mixture")
        if self.class_texts and self.label is None:
            raise ValueError(f"streams.{next(iter(self.class_texts))}: texts of classes want label, the field with a sample's class")
        tables = [self, *(self.of_part(name) for name in self.mixture)]
        for table in tables:
            table.check_streams()
        read = {name for table in tables for name in table.columns_read}
        columns = [self.columns, *(part.columns for part in self.mixture.values() if part.columns is not None)]
        unread = sorted({name for table in columns for name in table.model_extra or {}} - read)
        if unread:
            raise ValueError(f"columns.{unread[0]}: no stream reads it (expected image, text, or a name that a stream reads)")
        return self

    def check_streams(self) -> None:
        """Raises ValueError when streams do not fit each other or the rest of the table."""
        check_streams(self.streams)
        if self.text.captions is not None and (not self.conversations or "text" in self.conversations):
            raise ValueError("text.captions stand beside conversations, none of which may then be called text")
        if any(stream.regions is not None for stream in self.conversations.values()) and (
            self.image.augment != "none" or self.image.flip
        ):
            raise ValueError("boxes as text need pictures as they are: image.augment none and no flip")
        if self.swaps and (self.packer is not None or (self.conversations and self.text.captions is None)):
            raise ValueError(f"streams.{next(iter(self.swaps))}: there are no captions beside conversations (text.captions) or documents")
        self._check_numbers()

    def _check_numbers(self) -> None:
        talks = self.conversations
        by_caption = [name for name, stream in self.numbers.items() if stream.each == "caption"]
        drawn = self.captions.kind in ("sentences", "mix", "length") or (self.captions.kind == "random" and self.captions.columns)
        if by_caption and (drawn or "text" in talks or self.packer is not None):
            raise ValueError(f"streams.{by_caption[0]}: each = caption wants captions of kind one, random without columns, or several")
        for name, stream in self.weights.items() if not self.mixture else ():
            documents = self.packer is not None and not talks
            if stream.of not in talks and not (documents and stream.of == "text"):
                raise ValueError(f"streams.{name}: of = {stream.of!r} is no conversation stream, and no documents are packed")
            if documents and stream.answer is not None:
                raise ValueError(f"streams.{name}: a document has no answer; column and spans are fields of it")

    def of_part(self, name: str) -> DataOptions:
        """The table as it holds for one source of the mixture. Its `mixture` is empty."""
        part = self.mixture[name]
        return self.model_copy(
            update={
                "mixture": {},
                "source": part.source,
                "columns": self.columns if part.columns is None else part.columns,
                "streams": {**self.streams, **part.streams},
                "where": self.where if part.where is None else part.where,
            }
        )

    @property
    def shares(self) -> dict[str, Fraction]:
        """Name in the mixture -> its share of the samples, exact; they sum to 1."""
        weights = {name: Fraction(part.weight) for name, part in self.mixture.items()}
        return {name: weight / sum(weights.values()) for name, weight in weights.items()}

    @property
    def conversations(self) -> dict[str, ConversationStream]:
        return {name: s for name, s in self.streams.items() if isinstance(s, ConversationStream)}

    @property
    def noises(self) -> dict[str, DiffusionNoise]:
        return {name: s for name, s in self.streams.items() if isinstance(s, DiffusionNoise)}

    @property
    def masks(self) -> dict[str, MaskedPixels]:
        return {name: s for name, s in self.streams.items() if isinstance(s, MaskedPixels)}

    @property
    def numbers(self) -> dict[str, NumberStream]:
        return {name: s for name, s in self.streams.items() if isinstance(s, NumberStream)}

    @property
    def swaps(self) -> dict[str, SceneGraphSwap]:
        return {name: s for name, s in self.streams.items() if isinstance(s, SceneGraphSwap)}

    @property
    def weights(self) -> dict[str, TokenWeights]:
        return {name: s for name, s in self.streams.items() if isinstance(s, TokenWeights)}

    @property
    def class_texts(self) -> dict[str, ClassTexts]:
        return {name: s for name, s in self.streams.items() if isinstance(s, ClassTexts)}

    @property
    def columns_read(self) -> set[str]:
        """Names of fields that streams of conversations and numbers read."""
        read = {name for stream in self.conversations.values() for name in stream.columns}
        read |= {stream.column for stream in self.numbers.values()}
        return read | {n for s in self.weights.values() for n in (s.column, s.answer, s.spans) if n is not None}

    @property
    def column_names(self) -> dict[str, Any]:
        """`columns` as one dictionary: name -> field."""
        return self.columns.model_dump()

    @property
    def limits(self) -> PictureLimits:
        return PictureLimits(max_bytes=self.max_bytes, max_pixels=self.max_pixels)
