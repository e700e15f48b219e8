"""The tables `[data.streams.NAME]` of numbers: one a sample or a caption, one a token."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.config.options import Options


class NumberStream(Options):
    """A number of each sample from one of its fields (quality, alignment score): what `weights`, `smooth_by` and `shares` read.

    The number is offset + scale * (the value of the field). Text that spells a number is one, as a member of a tar holds it.
    """

    kind: Literal["numbers"] = "numbers"
    column: str = Field(description="field with the number; each = caption: with a list of numbers beside the list of captions")
    each: Literal["sample", "caption"] = Field("sample", description="one a sample, or one a row of the stream text")
    low: float = Field(0.0, allow_inf_nan=False, description="least value that the field may hold")
    high: float = Field(1.0, allow_inf_nan=False, description="greatest value that the field may hold")
    missing: float | None = Field(None, description="value where a sample has no such field; none: the sample is refused")
    scale: float = Field(1.0, allow_inf_nan=False, description="factor of the value (-1 with offset 1: of a quality, its lack)")
    offset: float = Field(0.0, allow_inf_nan=False, description="added to it afterwards")

    @model_validator(mode="after")
    def _inside(self) -> NumberStream:
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g}, expected at most high, {self.high:g}")
        if self.missing is not None and not self.low <= self.missing <= self.high:
            raise ValueError(f"missing is {self.missing:g}, expected {self.low:g} to {self.high:g}")
        return self


class TokenWeights(Options):
    """A weight of each token that a stream of texts supervises: what `weights` of token losses reads.

    The weight of a token is that of its sample, times that of its answer, times that of the span that it lies in. Spans are lists of
    { text, weight } or { start, end, weight }, in characters of the text without blanks around it; a token that reaches into a span
    lies in it, and of several spans the last one counts.
    """

    kind: Literal["token-weights"] = "token-weights"
    of: str = Field("text", description="conversation stream, or text where documents are packed")
    column: str | None = Field(None, description="field with the weight of a sample or document; without the field: 1")
    answer: str | None = Field(
        None,
        description="key with the weight of an answer, in the message, question or object it came from, or the sample of an answer "
        "from a column; without the key: 1",
    )
    spans: str | None = Field(None, description="key with the spans, there too; of a document, a field; without the key: none")
    words: dict[str, float] = Field({}, description="weight of whole words or phrases, wherever they are written so; before spans")
    rest: float = Field(1.0, ge=0, allow_inf_nan=False, description="weight outside of spans and words")
    end: float | None = Field(None, ge=0, allow_inf_nan=False, description="weight of what ends a text; none: as rest")
    high: float = Field(100.0, gt=0, allow_inf_nan=False, description="greatest weight that a field may hold; the least is 0")

    @model_validator(mode="after")
    def _says_something(self) -> TokenWeights:
        if (self.column, self.answer, self.spans, self.end) == (None,) * 4 and not self.words and self.rest == 1:
            raise ValueError("token-weights say nothing: give column, answer, spans, words, rest or end")
        for word, weight in self.words.items():
            if not word.strip() or not 0 <= weight <= self.high:
                raise ValueError(f"words: {word!r} = {weight:g}, expected a word and a weight from 0 to {self.high:g}")
        return self
