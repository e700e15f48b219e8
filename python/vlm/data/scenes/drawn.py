"""What the addresses of drawn sets have in common: `NAME:?n=20000&seed=1&split=val` and whole numbers of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from vlm.data.samples import Sample
from vlm.data.scenes.address import options_of
from vlm.data.sources.readers import open_reader
from vlm.runtime.pictures import DEFAULT_LIMITS
from vlm.types.random import draw_key, mix

_COMMON = {"n": (1, 50_000_000), "seed": (0, 2**62)}


class DrawnSource:
    """The first `n` samples of a seed and split. A recipe is an index; nothing is drawn before it is read.

    kind: in words. name: of the address and of the reader's spec. numbers: the set's own options: default, least, greatest.
    """

    kind: str
    name: ClassVar[str]
    numbers: ClassVar[Mapping[str, tuple[int, int, int]]]

    def __init__(self, n: int = 20_000, seed: int = 0, split: str = "train", **options: int) -> None:
        """options: of `numbers`; those left out have their defaults. Raises TypeError for others."""
        unknown = sorted(set(options) - set(self.numbers))
        if unknown:
            raise TypeError(f"{self.name}: no option {unknown[0]!r}")
        self.n, self.seed, self.split = n, seed, split
        self.options = {name: options.get(name, default) for name, (default, _, _) in self.numbers.items()}
        self._key = draw_key(seed, self.name, split)
        self._reader = open_reader(self.spec(), DEFAULT_LIMITS)
        self.ids = (mix(np.arange(n, dtype=np.uint64), self._key) >> np.uint64(1)).astype(np.int64)

    @classmethod
    def from_uri(cls, uri: str) -> Self:
        """Raises DataError that names a wrong option and the known ones."""
        own = {name: (least, greatest) for name, (_, least, greatest) in cls.numbers.items()}
        return cls(**options_of(uri, cls.name, {**_COMMON, **own}))

    def __len__(self) -> int:
        return self.n

    def key(self, index: int) -> str:
        return f"{self.name}-{self.split}-{self.seed}:{index}"

    def recipe(self, index: int) -> Any:
        return index

    def spec(self) -> dict[str, Any]:
        return {"kind": self.name, "key": self._key, "split": self.split, **self.options}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(index))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": self.kind, "samples": self.n, "seed": self.seed, "split": self.split, **self.options}
