"""Material: one pass over the data, embedded once, that all tasks of an evaluation share.

n samples, E embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm.config.errors import DataError, RunFailed
from vlm.runtime.embedder import Embedder

Floats = NDArray[np.float32]
CONCEPT = "concept"
"""The field whose equal values mark samples that are not independent evidence."""

MAX_NAMED = 20


@dataclass(frozen=True)
class Item:
    """One sample as evaluation sees it. picture() decodes and may raise DataError; None: it has none.

    index: its place in the source; problem: why it could not be read at all.
    """

    key: str
    texts: tuple[str, ...]
    fields: Mapping[str, Any]
    picture: Callable[[], Image.Image] | None = None
    index: int = 0
    problem: str | None = None


@dataclass
class BadTally:
    """Samples that could not be read: counted, the first ones named, and an error past the budget.

    budget: the share of samples that may be bad.
    """

    budget: float = 0.01
    count: int = 0
    good: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, key: str, reason: str) -> None:
        self.count += 1
        if len(self.named) < MAX_NAMED:
            first = reason.splitlines()[0] if reason else "unknown"
            self.named.append(f"{key}: {first}")

    def check(self) -> None:
        """Raises DataError when more than the budget was bad."""
        total = self.good + self.count
        if self.count > int(self.budget * total + 1e-9):
            raise DataError(
                f"{self.count} of {total} samples are bad, the budget is {self.budget:.1%}; first: {self.named[0]}",
                remedy="mend or remove them, or allow more with --bad-budget",
            )

    def as_json(self) -> dict[str, Any]:
        return {"count": self.count, "budget": self.budget, "first": self.named}


class Fingerprint:
    """A hash of what was evaluated: keys, texts and pixels, in order."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, item: Item, picture: Image.Image | None) -> None:
        for part in (item.key, *item.texts):
            data = part.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "little") + data)
        if picture is not None:
            self._hash.update(repr(picture.size).encode() + picture.tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def clean(text: str) -> str:
    """A text as it is compared: runs of white space are one space."""
    return " ".join(text.split())


def unit(rows: Floats, what: str) -> Floats:
    """Rows of length 1, float32. Raises RunFailed when a row is not finite or is zero."""
    rows = np.asarray(rows, dtype=np.float32)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    wrong = ~np.isfinite(lengths[..., 0]) | (lengths[..., 0] == 0)
    if wrong.any():
        raise RunFailed(
            f"{int(wrong.sum())} of {len(rows)} {what} embeddings are zero or not finite",
            remedy="the model's weights are unusable: check its training loss, or evaluate an earlier checkpoint",
        )
    return rows / lengths


def _cannot(number: int) -> Image.Image:
    raise LookupError(number)


def readable(
    items: Iterable[Item], bad: BadTally, take: Callable[[Image.Image], Any] = lambda picture: picture
) -> Iterator[tuple[Item, Any]]:
    """The items with what `take` makes of their pictures; one without, or whose picture is refused, is counted and left out."""
    for item in items:
        if item.problem is not None or item.picture is None:
            bad.add(item.key, item.problem or "missing_image: the sample has no picture")
            continue
        try:
            taken = take(item.picture())
        except DataError as error:
            bad.add(item.key, error.message)
            continue
        bad.good += 1
        yield item, taken


@dataclass
class Material:
    """keys, texts, fields: one entry a sample; images: [n, E] unit rows, None when pictures were not asked for.

    texts hold each sample's captions after `clean`; a sample may have several, samples may share one.
    """

    embedder: Embedder
    keys: list[str]
    texts: list[tuple[str, ...]]
    fields: list[Mapping[str, Any]]
    images: Floats | None
    fingerprint: str
    bad: BadTally
    reread: Callable[[int], Image.Image] = field(default=_cannot)
    _texts: dict[str, Floats] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def concepts(self) -> list[Hashable]:
        """The cluster of each sample: its `concept` field, or None: a cluster of its own."""
        found = [fields.get(CONCEPT) for fields in self.fields]
        return [concept if isinstance(concept, str | int) else None for concept in found]

    def embed_texts(self, texts: Sequence[str], batch: int = 256) -> Floats:
        """[len(texts), E] unit rows; each distinct text is encoded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(new), batch):
            part = new[start : start + batch]
            for text, row in zip(part, unit(self.embedder.encode_text(part), "text")):
                self._texts[text] = row
        return np.stack([self._texts[text] for text in texts])

    def pictures(self, wanted: Iterable[int]) -> dict[int, Image.Image]:
        """The pictures of some samples, read again; those that cannot be are left out."""
        out: dict[int, Image.Image] = {}
        for number in wanted:
            try:
                out[number] = self.reread(number)
            except (DataError, LookupError):
                continue
        return out


def _scalars(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that can be a label or concept: short texts and numbers, so that a large set stays small."""
    return {
        k: v for k, v in fields.items() if isinstance(v, str | int | float | bool) and len(str(v)) <= 1000
    }


def collect(
    embedder: Embedder,
    items: Iterable[Item],
    *,
    limit: int | None = None,
    batch: int = 64,
    bad: BadTally | None = None,
    reread: Callable[[int], Image.Image] = _cannot,
    progress: Callable[[int], None] | None = None,
    unit_rows: bool = True,
) -> Material:
    """Read and embed the pictures of `items`, the first `limit` good ones. reread: a picture by its place in the source;
    unit_rows: vectors are scaled to length 1 (logits are not).

    Raises DataError when nothing is left or more than the budget is bad.
    """
    bad = bad if bad is not None else BadTally()
    keys: list[str] = []
    texts: list[tuple[str, ...]] = []
    fields: list[Mapping[str, Any]] = []
    places: list[int] = []
    parts: list[Floats] = []
    waiting: list[Image.Image] = []
    fingerprint = Fingerprint()

    def flush() -> None:
        if waiting:
            rows = embedder.encode_image(waiting)
            scaled = unit(rows, "picture")  # says what is not finite, too
            parts.append(scaled if unit_rows else np.asarray(rows, np.float32))
            waiting.clear()
            if progress is not None:
                progress(len(keys))

    for item, picture in readable(items, bad):
        keys.append(item.key)
        places.append(item.index)
        texts.append(tuple(dict.fromkeys(t for t in map(clean, item.texts) if t)))
        fields.append(_scalars(item.fields))
        fingerprint.add(item, picture)
        waiting.append(picture)
        if len(waiting) == batch:
            flush()
        if limit is not None and len(keys) >= limit:
            break
    flush()
    bad.check()
    if not keys:
        raise DataError(
            "the data holds no sample with a picture", remedy="see what it holds with: vlm data inspect URI"
        )
    return Material(
        embedder, keys, texts, fields, np.concatenate(parts), fingerprint.hexdigest(), bad, reread
    )
