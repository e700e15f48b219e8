"""The trained classification head of a run: RUN/objectives.safetensors, which `vlm finetune linear-probe` leaves behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm.config.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    from vlm.runtime.embedder import Embedder

FILE = "objectives.safetensors"
_REMEDY = 'name the labels: --labels "cat,dog"'
_MAX_FILE = 2**30


@dataclass(frozen=True)
class Head:
    """weight [K, E], bias [K] over the K classes; normalise: whether it reads unit vectors."""

    name: str
    classes: list[str]
    weight: np.ndarray
    bias: np.ndarray
    normalise: bool

    def scores(self, embedder: Embedder, picture: Any) -> np.ndarray:
        """Logits [1, K] of one picture: bytes or a path. Raises BadPicture."""
        vector = embedder.encode_image([picture]) if self.normalise else _plain_embedding(embedder, picture)
        if vector.shape[1] != self.weight.shape[1]:
            raise CheckpointError(f"head {self.name!r} reads {self.weight.shape[1]} numbers, the model gives {vector.shape[1]}", where=FILE)
        return vector @ self.weight.T + self.bias


def has_head(run: str) -> bool:
    return (Path(run) / FILE).is_file()


def read_head(run: str) -> Head:
    """The head of a run. Raises RequestError when it has none or several, CheckpointError for a damaged file."""
    from safetensors import SafetensorError, safe_open

    from vlm.training.preset import load_preset, stages_of

    path = Path(run) / FILE
    _, resolved = load_preset(str(Path(run) / "preset.toml"))
    options = {o.name: o for o in stages_of(resolved)[-1].objectives if o.kind == "classification" and o.head == "own"}
    if len(options) != 1:
        found = ", ".join(options) or "none"
        raise RequestError(f"expected one classification head, found {found}", where=str(path), remedy=_REMEDY)
    name, chosen = next(iter(options.items()))
    if chosen.stream != "image":
        raise RequestError(f"head {name!r} classifies {chosen.stream!r}, not pictures", where=str(path), remedy=_REMEDY)
    try:
        if path.stat().st_size > _MAX_FILE:
            raise CheckpointError(f"larger than {_MAX_FILE} bytes", where=str(path))
        with safe_open(path, "numpy") as file:
            classes = json.loads((file.metadata() or {})[name])
            weight, bias = file.get_tensor(f"{name}.head.weight"), file.get_tensor(f"{name}.head.bias")
        if not isinstance(classes, list) or weight.ndim != 2 or bias.shape != (len(classes),) or len(weight) != len(classes):
            raise ValueError(f"{len(weight)} rows and {bias.size} biases for {len(classes)} classes")
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"cannot be read as the head {name!r}: {error}", where=str(path), remedy="run vlm finetune again") from error
    return Head(name, [str(label) for label in classes], weight, bias, bool(chosen.normalise))


def _plain_embedding(embedder: Any, picture: Any) -> np.ndarray:
    """[1, E] as the model gives it, not of unit length."""
    import torch

    from vlm.types import Batch, Pictures

    pixels = torch.from_numpy(embedder.prepare_image(picture))[None]
    row, zero = torch.arange(1), torch.zeros(1, dtype=torch.int64)
    batch = Batch({"image": Pictures(pixels, torch.ones(1, dtype=torch.bool), row)}, ["0"], zero, zero)
    embedder.model.eval()
    with torch.no_grad():
        embedding = embedder.model.encode(batch, {"image": frozenset({"embedding"})})["image"].embedding
    return embedding.float().numpy()
