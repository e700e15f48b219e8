"""Embedding cache: one vector a (stream, sample), kept on disk under the hash of the weights that made it.

Files are safetensors parts of (ids, vectors), published by rename; a half-written part is never seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.types.tensor_file import save_tensors


class EmbeddingCache:
    """Vectors by stream and sample id. `get` answers only when all ids are known, so that a batch is whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, dict[int, np.ndarray]] = {}
        self._fresh: dict[str, dict[int, np.ndarray]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.safetensors")):
            try:
                part = load_file(path)
            except (OSError, SafetensorError):
                path.unlink(missing_ok=True)  # a damaged part is only recomputed
                continue
            stream = path.name.rpartition("-")[0]
            known = self._known.setdefault(stream, {})
            known.update(zip(part["ids"].tolist(), part["vectors"].numpy()))

    @classmethod
    def of_model(cls, root: Path, state: Mapping[str, Tensor]) -> EmbeddingCache:
        """The cache of exactly these weights."""
        digest = hashlib.sha256()
        for name, tensor in sorted(state.items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return cls(root / digest.hexdigest()[:24])

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._known.values())

    def get(self, stream: str, ids: Tensor) -> Tensor | None:
        """[n, E] for ids [n], or None when any of them is unknown."""
        known = self._known.get(stream, {})
        rows = [known.get(int(i)) for i in ids.tolist()]
        if not rows or any(row is None for row in rows):
            return None
        return torch.from_numpy(np.stack([row for row in rows if row is not None]))

    def put(self, stream: str, ids: Tensor, vectors: Tensor) -> None:
        rows = dict(zip(ids.tolist(), vectors.detach().float().cpu().numpy()))
        self._known.setdefault(stream, {}).update(rows)
        self._fresh.setdefault(stream, {}).update(rows)

    def flush(self) -> None:
        """Write what is new as one more part a stream."""
        for stream, rows in self._fresh.items():
            if rows:
                ids = torch.tensor(list(rows), dtype=torch.int64)
                vectors = torch.from_numpy(np.stack(list(rows.values())))
                name = hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
                save_tensors({"ids": ids, "vectors": vectors}, self.folder / f"{stream}-{name}.safetensors")
        self._fresh.clear()
