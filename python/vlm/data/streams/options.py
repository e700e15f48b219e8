"""The tables `[data.streams.NAME]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from vlm.config.options import Options
from vlm.data.scene_swap import SwapMode
from vlm.data.streams.number_options import NumberStream, TokenWeights
from vlm.runtime.descriptors import Descriptors


class Literally(Options):
    """Text that every sample has; of several, one is drawn for each sample and epoch."""

    literal: str | tuple[str, ...] = Field(description="the text, or texts to draw from")


class Corruption(Options):
    """The answer of another stream with one thing made wrong, by rules. Source: povid."""

    kind: Literal["corruption"] = "corruption"
    of: str = Field(description="conversation stream whose answer is made wrong")
    rules: tuple[Literal["object", "relation", "attribute"], ...] = Field(
        ("object", "relation", "attribute"),
        min_length=1,
        description="what may be made wrong; where the drawn rule does not apply, another of these does",
    )


class AnswerOptions(Options):
    """Where the answer comes from: a column, and what to do for a sample that lacks it."""

    column: str | None = Field(None, description="field with the answer; of a list, one entry is drawn")
    otherwise: Corruption | None = Field(None, description="what answers where the column is missing")

    @model_validator(mode="after")
    def _some(self) -> AnswerOptions:
        if self.column is None and self.otherwise is None:
            raise ValueError("an answer needs column, otherwise, or both")
        return self


class Questions(Options):
    """A list of {question, answer, kind}, of which `turns` are drawn for each sample and epoch, in drawn order."""

    column: str = Field("questions", description="field with the list")
    kinds: tuple[str, ...] = Field((), description="kinds of question to ask; none: all")
    turns: int = Field(1, ge=1, le=64, description="questions asked one after another; all there are where these are fewer")
    balance: Literal["none", "kinds", "answers"] = Field(
        "kinds",
        description="none: every question alike; kinds: the kind is drawn first; answers: rare answers of a kind more often",
    )


class Regions(Options):
    """A list of objects with boxes: asked is where one of them is, the answer is its box as text. Source: infmllm.

    Boxes are shares of width and height of the stored picture; the answer gives shares of what the model sees.
    """

    column: str = Field("objects", description="field with the list of objects")
    phrase: str = Field("{color} {shape}", description="what an object is called, with its fields in braces")
    box: str = Field("box", description="field of an object with [x0, y0, x1, y1]")
    prompt: str = Field("where is the {phrase}?", description="the question; {phrase} stands for the object")
    decimals: int = Field(2, ge=1, le=6, description="digits of a coordinate")


class ConversationStream(Options):
    """Messages by the model's template; the answers of the assistant are supervised.

    One of: `messages` (a column in LLaVA's or OpenAI's form), `answer` with an optional `prompt`, `questions`, `regions`.
    """

    kind: Literal["conversation"] = "conversation"
    messages: str | None = Field(
        None, description="field with messages, or auto (conversations, messages); the default if nothing else is given"
    )
    prompt: str | Literally | None = Field(None, description="field with what the user says, or { literal = text }")
    answer: str | AnswerOptions | None = Field(
        None, description="field with the answer (auto: the text column), or { column, otherwise }"
    )
    questions: str | Questions | None = Field(None, description="field with questions and answers, one drawn a sample")
    regions: str | Regions | None = Field(None, description="field with objects and their boxes, one asked for a sample")
    system: str | None = Field(None, description="system message; none: that of the data or the template")
    text_only: bool = Field(False, description="whether samples without a picture are good")

    @model_validator(mode="after")
    def _one_source(self) -> ConversationStream:
        given = [name for name in ("messages", "answer", "questions", "regions") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"a conversation has one source, found {' and '.join(given)}")
        if self.prompt is not None and given != ["answer"]:
            raise ValueError("prompt goes with answer")
        return self

    @property
    def questions_table(self) -> Questions | None:
        return Questions(column=self.questions) if isinstance(self.questions, str) else self.questions

    @property
    def regions_table(self) -> Regions | None:
        return Regions(column=self.regions) if isinstance(self.regions, str) else self.regions

    @property
    def answer_table(self) -> AnswerOptions | None:
        return AnswerOptions(column=self.answer) if isinstance(self.answer, str) else self.answer

    @property
    def corruption(self) -> Corruption | None:
        table = self.answer_table
        return table.otherwise if table is not None else None

    @property
    def columns(self) -> list[str]:
        """The fields that it reads."""
        answer, questions, regions = self.answer_table, self.questions_table, self.regions_table
        found = [self.messages, self.prompt if isinstance(self.prompt, str) else None]
        found += [table.column for table in (answer, questions, regions) if table is not None]
        return [name for name in found if name is not None]


class Betas(Options):
    """The noise of each step: low + (high - low) * sigmoid(x), x evenly spaced from `from` to `to`."""

    model_config = ConfigDict(serialize_by_alias=True, validate_by_name=True)

    shape: Literal["sigmoid"] = Field("sigmoid", description="how it grows with the step")
    from_: float = Field(-6.0, alias="from", description="argument of the sigmoid at the first step")
    to: float = Field(6.0, description="argument of the sigmoid at the last step")
    low: float = Field(1e-5, gt=0, lt=1, description="least beta")
    high: float = Field(0.5e-2, gt=0, lt=1, description="greatest beta")

    @model_validator(mode="after")
    def _ordered(self) -> Betas:
        if self.low > self.high:
            raise ValueError(f"low is {self.low}, expected at most high, {self.high}")
        return self


class DiffusionNoise(Options):
    """A picture stream with the noise of a diffusion step, drawn once for each sample and epoch. Source: povid.

    The noise is added to values in 0..1 at the model's own size, before normalisation, and clamped to 0..1.
    """

    kind: Literal["diffusion-noise"] = "diffusion-noise"
    of: str = Field("image", description="picture stream that is made noisy")
    at: Literal["decoded"] = Field("decoded", description="decoded: pixels at the model's size, before normalisation")
    step: int = Field(500, ge=0, description="index of the step, counted from 0")
    steps: int = Field(1000, ge=1, le=1_000_000, description="steps of the schedule")
    betas: Betas = Betas()

    @model_validator(mode="after")
    def _inside(self) -> DiffusionNoise:
        if self.step >= self.steps:
            raise ValueError(f"step is {self.step}, expected less than steps, {self.steps}")
        return self


class MaskedPixels(Options):
    """A picture stream with squares that the model must not see, drawn once for each sample and epoch. Source: swin-v2 (SimMIM)."""

    kind: Literal["masked-pixels"] = "masked-pixels"
    of: str = Field("image", description="picture stream that squares are hidden of")
    patch: int = Field(32, ge=1, description="side of a square in pixels of the model's input")
    ratio: float = Field(0.6, gt=0, le=1, description="share of the squares that is hidden, rounded up")


class ClassTexts(Options):
    """A text or several of every class of `data.label`: rows that belong to the run and not to a sample. Sources: coop, dclip.

    `sample_index` of a row is its class, `slot` which of the class's texts it is.
    """

    kind: Literal["classes"] = "classes"
    template: str | None = Field(
        None, description="text of a class, {} stands for its name; default: the prompt that the model learns, else the name"
    )
    descriptors: Descriptors | None = Field(
        None, description="class -> what can be seen of it, a table or a JSON file: one text each, in place of the name alone"
    )

    @model_validator(mode="after")
    def _one_place(self) -> ClassTexts:
        if self.template is not None and self.template.count("{}") != 1:
            raise ValueError(f"template {self.template!r} must hold {{}} exactly once, where the class name goes")
        return self


class SceneGraphSwap(Options):
    """The captions of `text` made wrong by one exchange, drawn for each caption and epoch: the two objects of a relation, or an
    attribute of two objects. A caption that has nothing to exchange has no row. Source: structure-clip.
    """

    kind: Literal["scene-graph-swap"] = "scene-graph-swap"
    of: Literal["text"] = Field("text", description="stream of captions that are made wrong")
    modes: tuple[SwapMode, ...] = Field(
        ("relation", "attribute"),
        min_length=1,
        description="what may be exchanged; the mode is drawn among those that the caption allows",
    )


StreamOptions = Annotated[
    ConversationStream
    | DiffusionNoise
    | MaskedPixels
    | NumberStream
    | SceneGraphSwap
    | TokenWeights
    | ClassTexts,
    Field(discriminator="kind"),
]


AnyStream = ConversationStream | DiffusionNoise | MaskedPixels | NumberStream | SceneGraphSwap | TokenWeights | ClassTexts


def _plainly(stream: ConversationStream | NumberStream | TokenWeights | ClassTexts) -> str:
    if isinstance(stream, ClassTexts):
        return "texts of classes"
    return "a conversation" if isinstance(stream, ConversationStream) else "numbers"


def check_streams(streams: Mapping[str, AnyStream]) -> None:
    """Names fit their kinds and what they refer to exists. Raises ValueError."""
    for name, stream in streams.items():
        picture = name == "image" or name.startswith("image.")
        if isinstance(stream, DiffusionNoise | MaskedPixels):
            if not name.startswith("image."):
                raise ValueError(f"streams.{name}: a picture stream is called image.NAME")
            if stream.of in streams:
                raise ValueError(f"streams.{name}: of = {stream.of!r} is itself made from another stream")
            continue
        numbers = isinstance(stream, NumberStream | TokenWeights | ClassTexts)
        if isinstance(stream, SceneGraphSwap):
            if picture or name in ("", "group", "label", "text"):
                raise ValueError(f"streams.{name}: captions made wrong cannot have this name; text.negative is a usual one")
            continue
        if picture or name in ("", "group", "label", *(("text",) if numbers else ())):
            raise ValueError(f"streams.{name}: {_plainly(stream)} cannot have this name")
        if isinstance(stream, NumberStream | TokenWeights | ClassTexts):
            continue
        if stream.corruption is not None:
            other = streams.get(stream.corruption.of)
            if not isinstance(other, ConversationStream) or other.corruption is not None:
                raise ValueError(
                    f"streams.{name}: of = {stream.corruption.of!r} is no conversation stream with answers of its own"
                )
