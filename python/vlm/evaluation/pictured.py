"""Samples with pictures for a model that writes: read once, shared by the tasks of an evaluation.

n samples.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm.config.errors import DataError
from vlm.evaluation.material import CONCEPT, BadTally, Fingerprint, Item, clean, readable

if TYPE_CHECKING:
    from vlm.runtime.generation import Generator

Prepared = Mapping[str, NDArray[Any]]
"""Picture stream -> a prepared picture [3, S, S], or its tiles [k, 3, S, S]."""

CACHE_BYTES = 2**28


@dataclass
class Pictured:
    """keys, texts, fields, places: one entry a sample; prepared pictures are kept up to `cache_bytes` and read again
    beyond. texts after `clean`."""

    generator: Generator
    keys: list[str]
    texts: list[tuple[str, ...]]
    fields: list[Mapping[str, Any]]
    places: list[int]
    fingerprint: str
    bad: BadTally
    reread: Callable[[int], Image.Image]
    cache_bytes: int = CACHE_BYTES
    progress: Callable[[int, str], None] | None = None
    _cache: OrderedDict[int, Prepared] = field(default_factory=OrderedDict)
    _held: int = 0

    def __len__(self) -> int:
        return len(self.keys)

    def concepts(self) -> list[Hashable]:
        """The cluster of each sample: its `concept` field, or None: a cluster of its own."""
        found = [fields.get(CONCEPT) for fields in self.fields]
        return [concept if isinstance(concept, str | int) else None for concept in found]

    def likenesses(self) -> list[Hashable]:
        """What samples share whose pictures would answer for one another: the concept, or else the first text."""
        firsts = [(1, texts[0].lower()) if texts else None for texts in self.texts]
        return [(0, concept) if concept is not None else first for concept, first in zip(self.concepts(), firsts)]

    def picture(self, number: int) -> Image.Image:
        """The RGB picture of a sample, read again. Raises DataError."""
        return self.reread(self.places[number])

    def prepared(self, number: int) -> Prepared:
        """The prepared picture of a sample. Raises DataError when it cannot be read a second time."""
        if number not in self._cache:
            self._keep(number, self.generator.prepare_image(self.picture(number)))
        self._cache.move_to_end(number)
        return self._cache[number]

    def _keep(self, number: int, prepared: Prepared) -> None:
        self._cache[number] = prepared
        self._held += _size(prepared)
        while self._held > self.cache_bytes and len(self._cache) > 1:
            self._held -= _size(self._cache.popitem(last=False)[1])

    def pictures(self, wanted: Iterable[int]) -> dict[int, Image.Image]:
        """The pictures of some samples, read again; those that cannot be are left out."""
        out: dict[int, Image.Image] = {}
        for number in wanted:
            try:
                out[number] = self.picture(number)
            except (DataError, LookupError):
                continue
        return out

    def said(self, count: int, what: str) -> None:
        if self.progress is not None:
            self.progress(count, what)


def _size(prepared: Prepared) -> int:
    return sum(np.asarray(array).nbytes for array in prepared.values())


def collect_pictured(
    generator: Generator,
    items: Iterable[Item],
    *,
    bad: BadTally,
    reread: Callable[[int], Image.Image],
    cache_bytes: int = CACHE_BYTES,
    progress: Callable[[int, str], None] | None = None,
) -> Pictured:
    """Read and prepare the pictures of `items`. reread: a picture by its place in the source.

    Raises DataError when nothing is left or more than the budget is bad.
    """
    fingerprint = Fingerprint()
    out = Pictured(generator, [], [], [], [], "", bad, reread, cache_bytes, progress)
    for item, (picture, prepared) in readable(items, bad, lambda picture: (picture, generator.prepare_image(picture))):
        out._keep(len(out.keys), prepared)
        out.keys.append(item.key)
        out.texts.append(tuple(dict.fromkeys(t for t in map(clean, item.texts) if t)))
        out.fields.append(item.fields)
        out.places.append(item.index)
        fingerprint.add(item, picture)
    bad.check()
    if not out.keys:
        raise DataError(
            "the data holds no sample with a picture", remedy="see what it holds with: vlm data inspect URI"
        )
    out.fingerprint = fingerprint.hexdigest()
    return out
