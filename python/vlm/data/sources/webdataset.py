"""WebDataset shards: tar files whose members share a name up to the first dot."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm.data.samples import Sample, distinct, stable_id
from vlm.data.sources.readers import TarReader
from vlm.data.sources.tar_index import TarIndex, scan_tar
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits


def short_names(paths: Sequence[str]) -> list[str]:
    """The file names, with as many folders before them as it takes to tell them apart."""
    for depth in range(1, 64):
        names = ["/".join(os.path.abspath(path).split(os.sep)[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return list(paths)


class WebDatasetSource:
    """All samples of some shards, shard by shard in the order given."""

    kind = "WebDataset tar shards"

    def __init__(self, paths: Sequence[str], limits: PictureLimits = DEFAULT_LIMITS) -> None:
        self.paths = list(paths)
        self.names = short_names(self.paths)
        self.indexes: list[TarIndex] = [scan_tar(path) for path in self.paths]
        self._first = np.cumsum([0] + [len(index) for index in self.indexes])
        self._reader = TarReader(self.paths, limits)
        ids = [stable_id(name, key) for name, index in zip(self.names, self.indexes) for key in index.keys]
        self.ids = distinct(np.asarray(ids, np.int64))

    def __len__(self) -> int:
        return int(self._first[-1])

    def _place(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    def key(self, index: int) -> str:
        shard, row = self._place(index)
        return f"{self.names[shard]}:{self.indexes[shard].keys[row]}"

    def recipe(self, index: int) -> Any:
        shard, row = self._place(index)
        return [shard, self.indexes[shard].problems.get(row), *self.indexes[shard].members(row)]

    def spec(self) -> dict[str, Any]:
        return {"kind": "tar", "shards": [os.path.abspath(path) for path in self.paths]}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(self.recipe(index)))

    def describe(self) -> Mapping[str, Any]:
        extensions = sorted({e for index in self.indexes for e in index.extensions})
        return {
            "kind": self.kind,
            "samples": len(self),
            "files": len(self.paths),
            "members": extensions,
            "first_file": self.paths[0],
        }
