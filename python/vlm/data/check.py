"""Look at data before training: decode every sample and count, or show the first ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from vlm.data.captions import AUTO_TEXT, text_values
from vlm.data.decode import AUTO_IMAGE, Decoder, plain_fields
from vlm.data.mixture import part_of, parts_of
from vlm.data.options import DataOptions
from vlm.data.plan import Reads, decoder_spec
from vlm.data.samples import BadSample, clean_text, field_at
from vlm.data.sources.base import Source
from vlm.data.sources.readers import JsonLinesReader, open_reader
from vlm.data.streams.numbers import Weights
from vlm.runtime.pictures import BadPicture, decode_picture
from vlm.runtime.preprocess import Preprocess

_NAMED = 20
_MAX_DISTINCT = 1_000_000


class Checker:
    """Reads samples as training would, one by one, without resizing."""

    def __init__(self, source: Source, options: DataOptions) -> None:
        self.source = source
        self._parts = [_Part(own, table) for own, table in parts_of(source, options)]

    def read(self, index: int) -> Looked:
        """Raises BadSample or BadPicture."""
        recipe = self.source.recipe(index)
        if len(self._parts) == 1 and self._parts[0].source is self.source:
            return self._parts[0].read(recipe)
        return self._parts[part_of(self.source, index)].read(recipe[1])


@dataclass(frozen=True)
class Looked:
    """fields, pictures in order, the text or the last answer (None: no text), and of each conversation stream how many
    pictures its messages name (0: the template places them); numbers of each stream of numbers."""

    fields: dict[str, Any]
    pictures: list[Image.Image]
    text: str | None
    marked: dict[str, int]
    numbers: dict[str, list[float]]


class _Part:
    """One source with the table that holds for it."""

    def __init__(self, source: Source, options: DataOptions) -> None:
        self.source, self.options = source, options
        self.reader = open_reader(source.spec(), options.limits)
        self._talks = bool(options.conversations)
        self._decoder = None
        if self._talks or options.numbers:
            reads = Reads(None, {"image": Preprocess(1, "squash")})
            captions = not self._talks or options.text.captions is not None
            spec = decoder_spec(source, options, reads, captions, self._talks, train=False, extra=False, classes=())
            self._decoder = Decoder(spec)
        self._documents = Weights({} if self._talks else options.weights, options.column_names)

    def read(self, recipe: Any) -> Looked:
        fields = self.reader.read(recipe)
        numbers: dict[str, list[float]] = {}
        if self._decoder is not None:
            made = self._decoder.number(fields, None)
            numbers = {name: [number for number in own if number is not None] for name, own in made.items()}
        if self._decoder is None or not self._talks:
            picture, text = self._picture(fields), self._text(fields)
            for name in self._documents.streams if text is not None else ():
                self._documents.make(name, fields, [text or ""], [fields])
            return Looked(fields, [] if picture is None else [picture], text, {}, numbers)
        pictures, said = self._decoder.converse(fields, {})
        self._decoder.write(said, len(pictures))
        self._decoder.weigh(fields, said)
        marked = {name: sum(message.pictures for message in one.messages) for name, one in said.items()}
        return Looked(fields, pictures, next(iter(said.values())).answer, marked, numbers)

    def _picture(self, fields: dict[str, Any]) -> Image.Image | None:
        column = self.options.columns.image
        paths = AUTO_IMAGE if column == "auto" else (column,)
        value = next((v for path in paths if (v := field_at(fields, path)) is not None), None)
        if value is None:
            return None
        if isinstance(value, Image.Image):
            return value
        if isinstance(self.reader, JsonLinesReader):
            value = self.reader.picture(value)
        if not isinstance(value, bytes):
            raise BadSample("missing_image", f"holds a {type(value).__name__}")
        return decode_picture(value, self.options.limits)

    def _text(self, fields: dict[str, Any]) -> str | None:
        column = self.options.columns.text
        if column == "auto" and all(field_at(fields, path) is None for path in AUTO_TEXT):
            return None
        return clean_text(text_values(fields, column)[0], self.options.max_text)


def check(
    source: Source, options: DataOptions, progress: Callable[[int], None] | None = None
) -> dict[str, Any]:
    """Decode every sample. Counts by reason with the first bad keys, sizes, text lengths, duplicates, fields.

    If most samples have a picture (or a text), one without is bad: half of a pair is missing.
    `within_budget` says whether training under these options would get through an epoch.
    """
    checker = Checker(source, options)
    reasons: Counter[str] = Counter()
    bad: list[dict[str, str]] = []
    fields_seen: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    sides: list[int] = []
    lengths: list[int] = []
    captions: Counter[str] = Counter()
    lacking: dict[str, list[int]] = {"missing_image": [], "missing_text": []}
    talks = any(table.conversations for _, table in parts_of(source, options))
    marked: dict[str, Counter[int]] = {}
    numbers: dict[str, list[float]] = {}
    good = 0

    def note(index: int, reason: str, detail: str) -> None:
        reasons[reason] += 1
        if len(bad) < _NAMED:
            bad.append({"key": source.key(index), "reason": reason, "detail": detail})

    for index in range(len(source)):
        if progress is not None:
            progress(index)
        try:
            seen = checker.read(index)
        except (BadSample, BadPicture) as error:
            note(index, error.reason, error.detail)
            continue
        good += 1
        text = seen.text
        fields_seen.update(plain_fields(seen.fields).keys())
        for name, count in seen.marked.items():
            marked.setdefault(name, Counter())[count] += 1
        for name, own in seen.numbers.items():
            numbers.setdefault(name, []).extend(own)
        if not seen.pictures and not talks:
            lacking["missing_image"].append(index)
        for picture in seen.pictures:
            sizes[f"{picture.width}x{picture.height}"] += 1
            sides += [min(picture.size), max(picture.size)]
        if text is None:
            lacking["missing_text"].append(index)
        else:
            lengths.append(len(text))
            if len(captions) < _MAX_DISTINCT or text in captions:
                captions[text] += 1
    for reason, indexes in lacking.items():
        if 2 * len(indexes) < good:
            for index in indexes:
                note(index, reason, "others have one")
    total = sum(reasons.values())
    allowed = options.bad_samples.allowed(len(source))
    repeated = {text: count for text, count in captions.items() if count > 1}
    return {
        "source": dict(source.describe()),
        "samples": len(source),
        "good": len(source) - total,
        "bad": total,
        "budget": allowed,
        "within_budget": total <= allowed,
        "reasons": dict(sorted(reasons.items())),
        "first_bad": bad,
        "fields": dict(fields_seen.most_common()),
        "pictures": {
            "count": sum(sizes.values()),
            "sizes": dict(sizes.most_common(10)),
            "smallest_side": min(sides, default=None),
            "largest_side": max(sides, default=None),
        },
        "texts": {
            "count": len(lengths),
            "distinct": len(captions),
            "repeated": sum(repeated.values()),
            "most_repeated": dict(Counter(repeated).most_common(5)),
            "characters": _spread(lengths),
        },
        **({"numbers": {name: _numbers(own) for name, own in numbers.items()}} if numbers else {}),
        **({"placeholders": {name: _named(counts) for name, counts in marked.items()}} if talks else {}),
    }


def _named(counts: Counter[int]) -> dict[str, int]:
    """How many samples name so many pictures in their messages; none: the template places them."""
    return {str(count) if count else "none": samples for count, samples in sorted(counts.items())}


def _numbers(values: list[float]) -> dict[str, float]:
    """Of a stream of numbers: how many, least, mean, greatest."""
    if not values:
        return {"count": 0}
    return {"count": len(values), "min": min(values), "mean": round(sum(values) / len(values), 6), "max": max(values)}


def _spread(values: list[int]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    n = len(ordered)
    return {
        "min": ordered[0],
        "mean": round(sum(ordered) / n, 2),
        "median": ordered[n // 2],
        "p95": ordered[min(n - 1, int(0.95 * n))],
        "max": ordered[-1],
    }


def first_samples(source: Source, options: DataOptions, count: int) -> list[dict[str, Any]]:
    """The first samples: key, text, picture (RGB or None), fields, or the reason why one is bad."""
    checker = Checker(source, options)
    out: list[dict[str, Any]] = []
    for index in range(min(count, len(source))):
        entry: dict[str, Any] = {"key": source.key(index)}
        try:
            seen = checker.read(index)
        except (BadSample, BadPicture) as error:
            entry |= {"bad": error.reason, "detail": error.detail}
        else:
            picture = seen.pictures[0] if seen.pictures else None
            entry |= {"text": seen.text, "picture": picture, "fields": plain_fields(seen.fields)}
        out.append(entry)
    return out


def contact_sheet(samples: list[dict[str, Any]], cell: int = 160, columns: int = 6) -> Image.Image:
    """A picture of samples in a grid, each with its text below, bad ones in red with their reason."""
    rows = -(-len(samples) // columns) or 1
    label = 28
    sheet = Image.new("RGB", (columns * cell, rows * (cell + label)), (255, 255, 255))
    pen = ImageDraw.Draw(sheet)
    for i, sample in enumerate(samples):
        x, y = i % columns * cell, i // columns * (cell + label)
        picture = sample.get("picture")
        if picture is not None:
            shown = picture.copy()
            shown.thumbnail((cell - 8, cell - 8))
            sheet.paste(shown, (x + (cell - shown.width) // 2, y + (cell - shown.height) // 2))
        text = sample.get("bad") or sample.get("text") or sample["key"]
        color = (190, 20, 20) if "bad" in sample else (20, 20, 20)
        pen.text((x + 4, y + cell), _fit(pen, str(text), cell - 8), fill=color)
    return sheet


def _fit(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text in at most two lines of `width` pixels."""
    lines, current = [], ""
    for word in text[:200].split():
        longer = f"{current} {word}".strip()
        if current and pen.textlength(longer) > width:
            lines.append(current)
            current = word
        else:
            current = longer
    lines.append(current)
    return "\n".join(lines[:2])
