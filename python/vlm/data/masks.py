"""Random squares of a picture that a model must not see. Source: swin-v2 (SimMIM)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from vlm.types.batch import Pictures
from vlm.types.random import draw_key


def drawn_squares(grid: int, ratio: float, key: int) -> np.ndarray:
    """bool [grid, grid], ceil(ratio grid^2) of them true, drawn from `key`."""
    order = np.random.Generator(np.random.Philox(key=key)).permutation(grid * grid)
    out = np.zeros(grid * grid, bool)
    out[order[: math.ceil(ratio * grid * grid)]] = True
    return out.reshape(grid, grid)


def with_squares(pictures: Pictures, keys: Sequence[int], patch: int, ratio: float) -> Pictures:
    """The same pictures with squares of `patch` pixels to hide in each, drawn from the key of its sample and its number
    among the sample's pictures. Raises ValueError when the side is no multiple of `patch`."""
    side = pictures.values.shape[-1]
    if side % patch:
        raise ValueError(f"pictures of {side} pixels are no whole number of squares of {patch}")
    seen: dict[int, int] = {}
    squares = np.zeros((len(pictures), side // patch, side // patch), bool)
    for row, sample in enumerate(pictures.sample_index.tolist()):
        number = seen.get(sample, 0)
        seen[sample] = number + 1
        squares[row] = drawn_squares(side // patch, ratio, draw_key(keys[sample], "squares", number))
    return replace(pictures, masked=torch.from_numpy(squares))
