"""The address of drawn scenes: `scenes:?n=20000&seed=1&split=val&size=64&yes=75`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from vlm.config.errors import DataError
from vlm.data.samples import Sample
from vlm.data.scenes.reader import SceneReader
from vlm.types.random import draw_key, mix

_OPTIONS = {"n": (20_000, 1, 50_000_000), "seed": (0, 0, 2**62), "size": (64, 8, 1024), "yes": (50, 0, 100)}
_SPLITS = ("train", "val", "test")


class ScenesSource:
    """The first `n` scenes of a seed and split. A composition occurs in one split only, whatever the seed.

    yes: percent of the yes-no questions that are answered by yes (debias-lvlm needs a skewed set).
    """

    kind = "drawn scenes"

    def __init__(self, n: int = 20_000, seed: int = 0, split: str = "train", size: int = 64, yes: int = 50) -> None:
        self.n, self.seed, self.split, self.size, self.yes = n, seed, split, size, yes
        self._key = draw_key(seed, "scenes", split)
        self._reader = SceneReader(self.spec())
        self.ids = (mix(np.arange(n, dtype=np.uint64), self._key) >> np.uint64(1)).astype(np.int64)

    @classmethod
    def from_uri(cls, uri: str) -> ScenesSource:
        """Raises DataError that names a wrong option and the known ones."""
        query = uri.removeprefix("scenes:").lstrip("/").removeprefix("?")
        known = ", ".join([*_OPTIONS, "split"])
        options: dict[str, Any] = {}
        for name, value in parse_qsl(query, keep_blank_values=True, strict_parsing=False):
            if name == "split" and value in _SPLITS:
                options[name] = value
            elif name == "split":
                raise DataError(f"split is {value!r}, expected one of {', '.join(_SPLITS)}", where=uri)
            elif name in _OPTIONS:
                _, low, high = _OPTIONS[name]
                if not value.isascii() or not value.isdigit() or not low <= int(value) <= high:
                    raise DataError(f"{name} is {value!r}, expected a number from {low} to {high}", where=uri)
                options[name] = int(value)
            else:
                raise DataError(f"unknown option {name!r}", where=uri, remedy=f"known options: {known}")
        if query and not options:
            raise DataError(
                f"cannot read the options {query!r}", where=uri, remedy="write scenes:?n=1000&split=val"
            )
        return cls(**options)

    def __len__(self) -> int:
        return self.n

    def key(self, index: int) -> str:
        return f"scenes-{self.split}-{self.seed}:{index}"

    def recipe(self, index: int) -> Any:
        return index

    def spec(self) -> dict[str, Any]:
        return {"kind": "scenes", "key": self._key, "split": self.split, "size": self.size, "yes": self.yes}

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
        }
