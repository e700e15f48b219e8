"""The address of drawn scenes: `scenes:?n=20000&seed=1&split=val&size=64&yes=75&objects=4`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.data.samples import Sample
from vlm.data.scenes.address import options_of
from vlm.data.scenes.layout import MOST_OBJECTS
from vlm.data.scenes.reader import SceneReader
from vlm.types.random import draw_key, mix

_NUMBERS = {"n": (1, 50_000_000), "seed": (0, 2**62), "size": (8, 1024), "yes": (0, 100), "objects": (1, MOST_OBJECTS)}


class ScenesSource:
    """The first `n` scenes of a seed and split. A composition occurs in one split only, whatever the seed.

    yes: percent of the yes-no questions that are answered by yes (debias-lvlm needs a skewed set). objects: most of a scene.
    """

    kind = "drawn scenes"

    def __init__(
        self, n: int = 20_000, seed: int = 0, split: str = "train", size: int = 64, yes: int = 50, objects: int = MOST_OBJECTS
    ) -> None:
        self.n, self.seed, self.split, self.size, self.yes, self.objects = n, seed, split, size, yes, objects
        self._key = draw_key(seed, "scenes", split)
        self._reader = SceneReader(self.spec())
        self.ids = (mix(np.arange(n, dtype=np.uint64), self._key) >> np.uint64(1)).astype(np.int64)

    @classmethod
    def from_uri(cls, uri: str) -> ScenesSource:
        """Raises DataError that names a wrong option and the known ones."""
        return cls(**options_of(uri, "scenes", _NUMBERS))

    def __len__(self) -> int:
        return self.n

    def key(self, index: int) -> str:
        return f"scenes-{self.split}-{self.seed}:{index}"

    def recipe(self, index: int) -> Any:
        return index

    def spec(self) -> dict[str, Any]:
        return {"kind": "scenes", "key": self._key, "split": self.split, "size": self.size, "yes": self.yes, "objects": self.objects}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(index))

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "samples": self.n,
            "seed": self.seed,
            "split": self.split,
            "size": self.size,
            "yes": self.yes,
            "objects": self.objects,
        }
