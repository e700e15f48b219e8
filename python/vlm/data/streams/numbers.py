"""Numbers and weights from the fields of a sample. Runs in workers and imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from vlm.data.samples import BadSample, field_at
from vlm.data.streams.number_options import NumberStream, TokenWeights

Span = tuple[int, int, float]
"""Characters from, to (not included) and the weight of what lies there."""


class Marked(NamedTuple):
    """Weights of one text: of its characters outside of spans, of its spans, of what ends it."""

    rest: float
    spans: list[Span]
    end: float

    def at(self, start: int, stop: int) -> float:
        """The weight of a token of characters start..stop-1; one without characters is outside of every span."""
        found = self.rest
        for first, last, weight in self.spans:
            if first < stop and start < last:
                found = weight
        return found


PLAIN = Marked(1.0, [], 1.0)


def number_of(value: Any, name: str, low: float, high: float) -> float:
    """A number, or text that spells one. Raises BadSample that names the field, the value and the range."""
    number = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value) if abs(value) < 1e300 else math.inf
    elif isinstance(value, str) and len(value) < 100:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if not low <= number <= high:  # NaN is nowhere
        raise BadSample("bad_number", f"{name}: {str(value)[:40]!r}, expected a number from {low:g} to {high:g}")
    return number


class Numbers:
    """All streams of kind `numbers`. columns: `[data.columns]`, where a name may stand for another field."""

    def __init__(self, streams: Mapping[str, NumberStream], columns: Mapping[str, str]) -> None:
        self.streams, self.columns = streams, columns

    def make(self, fields: Mapping[str, Any], captions: int, places: Sequence[int | None]) -> dict[str, list[float | None]]:
        """Stream -> its numbers by slot.

        captions: how many texts the text column has; places: which of them is each slot's (None: an empty slot). Raises BadSample.
        """
        return {name: self._one(stream, fields, captions, places) for name, stream in self.streams.items()}

    def _one(self, stream: NumberStream, fields: Mapping[str, Any], captions: int, places: Sequence[int | None]) -> list[float | None]:
        column = self.columns.get(stream.column, stream.column)
        value = field_at(dict(fields), column)
        if value is None:
            if stream.missing is None:
                raise BadSample("missing_field", column)
            return [_scaled(stream, stream.missing)] if stream.each == "sample" else [
                None if place is None else _scaled(stream, stream.missing) for place in places
            ]
        if stream.each == "sample":
            return [_scaled(stream, number_of(value, column, stream.low, stream.high))]
        listed = value if isinstance(value, list) else [value]
        if len(listed) != captions:
            raise BadSample("bad_number", f"{column}: {len(listed)} numbers for {captions} captions")
        numbers = [number_of(one, f"{column}[{i}]", stream.low, stream.high) for i, one in enumerate(listed)]
        return [None if place is None else _scaled(stream, numbers[place]) for place in places]


def _scaled(stream: NumberStream, value: float) -> float:
    return stream.offset + stream.scale * value


class Weights:
    """All streams of kind `token-weights`."""

    def __init__(self, streams: Mapping[str, TokenWeights], columns: Mapping[str, str]) -> None:
        self.streams, self.columns = streams, columns
        self._words = {
            name: [(re.compile(rf"(?<!\w){re.escape(word)}(?!\w)"), weight) for word, weight in table.words.items()]
            for name, table in streams.items()
        }

    def make(self, name: str, fields: Mapping[str, Any], texts: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> list[Marked]:
        """The weights of each text of one stream.

        entries: what each text came from: a message, a question, an object, or the sample. Raises BadSample.
        """
        table = self.streams[name]
        factor = self._factor(table, fields, table.column)
        out = []
        for text, entry in zip(texts, entries):
            own = factor * (1.0 if table.answer is None else self._factor(table, entry, table.answer))
            spans = [(m.start(), m.end(), own * weight) for word, weight in self._words[name] for m in word.finditer(text)]
            spans += [(start, stop, own * weight) for start, stop, weight in self._spans(table, entry, text)]
            out.append(Marked(own * table.rest, spans, own * (table.rest if table.end is None else table.end)))
        return out

    def _factor(self, table: TokenWeights, fields: Mapping[str, Any], column: str | None) -> float:
        if column is None:
            return 1.0
        column = self.columns.get(column, column)
        value = field_at(dict(fields), column)
        return 1.0 if value is None else number_of(value, column, 0.0, table.high)

    def _spans(self, table: TokenWeights, entry: Mapping[str, Any], text: str) -> list[Span]:
        if table.spans is None:
            return []
        column = self.columns.get(table.spans, table.spans)
        value = field_at(dict(entry), column)
        if value is None:
            return []
        if not isinstance(value, list):
            raise BadSample("bad_span", f"{column}: a {type(value).__name__}, expected a list of spans")
        return [span for i, one in enumerate(value) for span in _span(one, f"{column}[{i}]", text, table.high)]


def _span(value: Any, name: str, text: str, high: float) -> list[Span]:
    if not isinstance(value, dict) or "weight" not in value:
        raise BadSample("bad_span", f"{name}: expected {{ text, weight }} or {{ start, end, weight }}")
    weight = number_of(value["weight"], f"{name}.weight", 0.0, high)
    phrase, start, end = value.get("text"), value.get("start"), value.get("end")
    if isinstance(phrase, str) and phrase:
        found = [(m.start(), m.end(), weight) for m in re.finditer(re.escape(phrase), text)]
        if not found:
            raise BadSample("bad_span", f"{name}: {phrase[:40]!r} is not in the text")
        return found
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        raise BadSample("bad_span", f"{name}: {str(start)[:20]}..{str(end)[:20]}, expected a part of 0..{len(text)}")
    return [(start, end, weight)]
