"""From a `[data]` table and what a model reads to jobs, specs of decoders, encoded rows and batches.

The part that training, packing and evaluation share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from vlm.config.errors import DataError
from vlm.data.collate import Row, Shape, collate, text_stream
from vlm.data.decode import Decoded, Job
from vlm.data.masks import with_squares
from vlm.data.mixture import part_of, parts_of
from vlm.data.options import DataOptions
from vlm.data.sources.base import Source
from vlm.data.streams.classes import class_stream
from vlm.data.streams.encode import ConversationEncoder, EncodedRow, encoded_or_reason
from vlm.data.streams.graphs import made_wrong, with_triples
from vlm.data.streams.numbers import Marked
from vlm.data.streams.tables import stream_tables
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.chat import Template
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.prompt import LearnedPrompt
from vlm.runtime.templates import TEMPLATES
from vlm.runtime.tiling import Tiling
from vlm.types.batch import Batch, Pictures, Stream, TokenIds
from vlm.types.random import draw_key

Preprocesses = Preprocess | Mapping[str, Preprocess] | None


def by_stream(preprocess: Preprocesses) -> dict[str, Preprocess]:
    """Picture stream -> preprocessing; one alone is that of `image`."""
    if preprocess is None:
        return {}
    return {"image": preprocess} if isinstance(preprocess, Preprocess) else dict(preprocess)


@dataclass(frozen=True)
class Reads:
    """What a model reads: its tokenizer, the preprocessing of each picture stream, positions of a row of pictures,
    template, how pictures are cut into such rows (None: a picture is one), whether tiles take no position, how
    many pictures of a sample it reads as a clip (None: a picture is read by itself), the prompt that it has learned, and how
    many triples of a text, of how many tokens a part (None: none)."""

    tokenizer: Tokenizer | None
    pictures: Mapping[str, Preprocess]
    picture_positions: int | None = None
    template: Template | None = None
    tiling: Tiling | None = None
    tiles_apart: bool = False
    frames: int | None = None
    prompt: LearnedPrompt | None = None
    triples: tuple[int, int] | None = None

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer | None,
        preprocess: Preprocesses,
        picture_positions: int | None = None,
        template: Template | None = None,
        tiling: Tiling | None = None,
        tiles_apart: bool = False,
        frames: int | None = None,
        prompt: LearnedPrompt | None = None,
        triples: tuple[int, int] | None = None,
    ) -> Reads:
        pictures = by_stream(preprocess)
        wrong = sorted(name for name in pictures if name != "image" and not name.startswith("image."))
        if wrong or (pictures and "image" not in pictures):
            raise DataError(f"picture streams {', '.join(pictures)}: expected image, and image.NAME for further towers")
        return cls(
            tokenizer, pictures, picture_positions, template, tiling if pictures else None, tiles_apart, frames, prompt, triples,
        )  # fmt: skip


class Plan:
    """How the samples of a source become rows of a batch."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        reads: Reads,
        *,
        seed: int,
        train: bool,
        extra: bool = False,
        classes: Sequence[str] = (),
    ) -> None:
        """Raises DataError when a stream is made from a picture stream that the model does not read, and for random crops
        of pictures that are cut into tiles."""
        self.source, self.options, self.reads, self.seed = source, options, reads, seed
        parts = parts_of(source, options)
        tables = [part for _, part in parts]
        self.conversations = list(dict.fromkeys(name for part in tables for name in part.conversations))
        if reads.tokenizer is None:
            self.conversations = []
        sides = {name: (preprocess.size, False) for name, preprocess in reads.pictures.items()}
        for part in tables if sides else []:
            for name, noise in part.noises.items():
                if noise.of not in reads.pictures or name in reads.pictures:
                    raise DataError(
                        f"of = {noise.of!r}: the model reads {', '.join(reads.pictures)}", where=f"data.streams.{name}"
                    )
                sides[name] = (reads.pictures[noise.of].size, True)
        self.weights = {name: table.of for part in tables for name, table in part.weights.items() if table.of in self.conversations}
        numbers = {name: table.each for part in tables for name, table in part.numbers.items()}
        self._masks = {name: table for part in tables for name, table in part.masks.items()} if sides else {}
        for name, table in self._masks.items():
            if table.of not in reads.pictures or name in sides:
                raise DataError(f"of = {table.of!r}: the model reads {', '.join(reads.pictures)}", where=f"data.streams.{name}")
            if reads.pictures[table.of].size % table.patch:
                raise DataError(
                    f"patch = {table.patch}, expected a divisor of the {reads.pictures[table.of].size} pixels of a picture",
                    where=f"data.streams.{name}",
                )
        if reads.tiling is not None and train and options.image.augment != "none":
            raise DataError(
                "a random crop has another shape, so other tiles", where="data.image.augment", remedy='set it to "none"'
            )
        beside = options.text.captions
        captions = reads.tokenizer is not None and (not self.conversations or beside is not None)
        length = options.text.length if options.packer is None else options.packer.length
        self.encoder = None
        if self.conversations and reads.tokenizer is not None:
            self.encoder = ConversationEncoder(
                reads.tokenizer, length, reads.picture_positions, bool(sides), tiles_apart=reads.tiles_apart
            )
        self.shape = Shape(
            sides,
            (beside or options.text.length) if captions else None,
            self.conversations,
            grouped=options.group_by is not None,
            labelled=options.label is not None,
            tiled=reads.tiling is not None,
            clips=reads.frames is not None,
            numbers={name: each == "caption" for name, each in numbers.items() if each == "sample" or captions},
            weights=self.weights,
        )
        self._swaps = {name: table for part in tables for name, table in part.swaps.items()} if captions else {}
        specs = [
            decoder_spec(own, part, reads, captions, bool(self.conversations), train=train, extra=extra, classes=classes)
            for own, part in parts
        ]
        self.spec: dict[str, Any] = {"parts": specs} if len(specs) > 1 or specs[0]["source"] != source.spec() else specs[0]
        image = options.image
        self._varies = train and bool(reads.pictures) and (image.augment != "none" or image.flip)
        self._draws_captions = bool(specs[0]["texts"]) and options.captions.kind != "one"
        self._shared: dict[str, Stream] = {}
        if reads.tokenizer is not None:
            for name, texts in options.class_texts.items():
                self._shared[name] = class_stream(name, texts, classes, reads.tokenizer, options.text.length, reads.prompt)
        self._drawn = [[*part.conversations, *(part.noises if reads.pictures else ())] for part in tables]

    def job(self, index: int, epoch: int) -> Job:
        """The work of one sample, with the keys of its draws."""
        draw = int(self.source.ids[index])
        drawn = self._drawn[part_of(self.source, index)]
        return Job(
            self.source.recipe(index),
            draw_key(self.seed, "augment", draw, epoch) if self._varies else 0,
            draw_key(self.seed, "caption", draw, epoch) if self._draws_captions else 0,
            {name: draw_key(self.seed, "stream", name, draw, epoch) for name in drawn},
        )

    def finish(self, decoded: Decoded) -> tuple[Decoded, dict[str, EncodedRow]]:
        """The sample with its conversations as ids; one that does not fit becomes bad."""
        if self.encoder is None or decoded.reason:
            return decoded, {}
        marks: dict[str, dict[str, list[Marked]]] = {}
        for name, own in decoded.marks.items():
            marks.setdefault(self.weights[name], {})[name] = own
        rows, reason, detail = encoded_or_reason(self.encoder, decoded.conversations, decoded.places, marks)
        return (Decoded(reason=reason, detail=detail), {}) if reason else (decoded, rows)

    def row(self, index: int, epoch: int, decoded: Decoded, encoded: dict[str, EncodedRow]) -> Row:
        return Row(self.source.key(index), int(self.source.ids[index]), epoch, decoded, encoded)

    def batch(self, rows: Sequence[Row]) -> Batch:
        batch = collate(rows, self.reads.tokenizer, self.shape)
        if self._shared:
            batch = replace(batch, shared={**batch.shared, **self._shared})
        hidden = {}
        for name, table in self._masks.items():
            pictures = batch[table.of]
            assert isinstance(pictures, Pictures)
            keys = [draw_key(self.seed, "stream", name, row.draw, row.epoch) for row in rows]
            hidden[name] = with_squares(pictures, keys, table.patch, table.ratio)
        return batch.with_streams({**hidden, **self._of_graphs(rows, batch)})

    def _of_graphs(self, rows: Sequence[Row], batch: Batch) -> dict[str, Stream]:
        """What the scene graphs of captions give: streams of captions made wrong, and `text` with its triples."""
        tokenizer, length = self.reads.tokenizer, self.shape.length
        if tokenizer is None or length is None:
            return {}
        out: dict[str, Stream] = {}
        for name, table in self._swaps.items():
            wrong = [
                [made_wrong(text, table, self.seed, name, row.draw, row.epoch, k) for k, text in enumerate(row.decoded.texts)]
                for row in rows
            ]
            out[name] = text_stream(tokenizer, wrong, length)
        if self.reads.triples is not None:
            text = batch["text"]
            assert isinstance(text, TokenIds)
            said = [one for row in rows for one in row.decoded.texts if one is not None]
            out["text"] = with_triples(text, said, tokenizer, *self.reads.triples)
        return out


def decoder_spec(
    source: Source,
    options: DataOptions,
    reads: Reads,
    captions: bool,
    talks: bool,
    *,
    train: bool,
    extra: bool,
    classes: Sequence[str],
) -> dict[str, Any]:
    """What a Decoder needs, as JSON. captions, talks: whether texts of captions and of conversations are made."""
    template = reads.template
    if template is None or "template" in options.text.model_fields_set:
        template = TEMPLATES[options.text.template or "plain"]
    tiling = reads.tiling
    if tiling is not None and not options.image.tiles:
        tiling = replace(tiling, max_tiles=1)
    return {
        "source": source.spec(),
        "limits": asdict(options.limits),
        "pictures": {name: asdict(preprocess) for name, preprocess in reads.pictures.items()},
        "tiling": None if tiling is None else asdict(tiling),
        "frames": reads.frames,
        "image": options.image.model_dump(mode="json"),
        "captions": options.captions.model_dump(mode="json"),
        "columns": options.column_names,
        "max_text": options.max_text,
        "group_by": options.group_by,
        "label": options.label,
        "classes": list(classes),
        "texts": captions or options.group_by == "text",
        "train": train,
        "extra": extra,
        "conversations": {n: s.model_dump(mode="json") for n, s in options.conversations.items()} if talks else {},
        "noises": {name: stream.model_dump(mode="json") for name, stream in options.noises.items()},
        "numbers": {name: stream.model_dump(mode="json") for name, stream in options.numbers.items()},
        "token_weights": {name: stream.model_dump(mode="json") for name, stream in options.weights.items()},
        "template": template.to_dict(),
        **(stream_tables(source, options) if talks else {"nouns": {}, "weights": {}}),
    }
