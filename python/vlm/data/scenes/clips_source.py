"""The address of drawn clips: `clips:?n=20000&seed=1&split=val&frames=8&size=32`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.data.samples import Sample
from vlm.data.scenes.address import options_of
from vlm.data.scenes.clips import ClipsReader
from vlm.types.random import draw_key, mix

_NUMBERS = {"n": (1, 50_000_000), "seed": (0, 2**62), "frames": (1, 256), "size": (8, 1024)}


class ClipsSource:
    """The first `n` clips of a seed and split. A colour and shape on a lane of the picture occur in one split only."""

    kind = "drawn clips"

    def __init__(self, n: int = 20_000, seed: int = 0, split: str = "train", frames: int = 8, size: int = 64) -> None:
        """frames: of a clip, each of size x size pixels."""
        self.n, self.seed, self.split, self.frames, self.size = n, seed, split, frames, size
        self._key = draw_key(seed, "clips", split)
        self._reader = ClipsReader(self.spec())
        self.ids = (mix(np.arange(n, dtype=np.uint64), self._key) >> np.uint64(1)).astype(np.int64)

    @classmethod
    def from_uri(cls, uri: str) -> ClipsSource:
        """Raises DataError that names a wrong option and the known ones."""
        return cls(**options_of(uri, "clips", _NUMBERS))

    def __len__(self) -> int:
        return self.n

    def key(self, index: int) -> str:
        return f"clips-{self.split}-{self.seed}:{index}"

    def recipe(self, index: int) -> Any:
        return index

    def spec(self) -> dict[str, Any]:
        return {"kind": "clips", "key": self._key, "split": self.split, "frames": self.frames, "size": self.size}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(index))

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "samples": self.n,
            "seed": self.seed,
            "split": self.split,
            "frames": self.frames,
            "size": self.size,
        }
