"""The address of drawn digits: `digits:?n=20000&seed=1&split=val&length=4&width=128&height=64`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.data.samples import Sample
from vlm.data.scenes.address import options_of
from vlm.data.scenes.digits import DigitsReader
from vlm.types.random import draw_key, mix

_NUMBERS = {
    "n": (1, 50_000_000),
    "seed": (0, 2**62),
    "length": (2, 64),
    "width": (8, 4096),
    "height": (8, 1024),
}


class DigitsSource:
    """The first `n` pictures of a seed and split. A number occurs in one split only, whatever the seed."""

    kind = "drawn digits"

    def __init__(
        self, n: int = 20_000, seed: int = 0, split: str = "train", length: int = 4, width: int = 128, height: int = 64
    ) -> None:
        """length: digits of a picture of width x height pixels."""
        self.n, self.seed, self.split, self.length, self.width, self.height = n, seed, split, length, width, height
        self._key = draw_key(seed, "digits", split)
        self._reader = DigitsReader(self.spec())
        self.ids = (mix(np.arange(n, dtype=np.uint64), self._key) >> np.uint64(1)).astype(np.int64)

    @classmethod
    def from_uri(cls, uri: str) -> DigitsSource:
        """Raises DataError that names a wrong option and the known ones."""
        return cls(**options_of(uri, "digits", _NUMBERS))

    def __len__(self) -> int:
        return self.n

    def key(self, index: int) -> str:
        return f"digits-{self.split}-{self.seed}:{index}"

    def recipe(self, index: int) -> Any:
        return index

    def spec(self) -> dict[str, Any]:
        return {
            "kind": "digits",
            "key": self._key,
            "split": self.split,
            "length": self.length,
            "width": self.width,
            "height": self.height,
        }

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(index))

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "samples": self.n,
            "seed": self.seed,
            "split": self.split,
            "length": self.length,
            "size": f"{self.width} x {self.height}",
        }
