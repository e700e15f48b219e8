"""Pooling of token grids by a stride, and clips brought to a length, in plain torch operators that export. Source: core-pool.

B batch, T frames, h x w grid, C width (last).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

StridePool = Literal["average", "max", "bilinear"]
_POOLS: tuple[StridePool, ...] = ("average", "max", "bilinear")


def stride_pool(x: Tensor, stride: int, *, kind: StridePool = "average") -> Tensor:
    """x [B, h, w, C] -> [B, ceil(h / stride), ceil(w / stride), C].

    average, max: over windows of stride x stride that do not overlap; those at the far edges hold what is left there.
    bilinear: the grid as a picture, resized (pixel centres, no antialiasing). At stride 1 all are the identity.
    """
    if x.ndim != 4 or min(x.shape[1:3], default=0) < 1 or stride < 1 or kind not in _POOLS:
        raise ValueError(f"stride_pool: x {tuple(x.shape)}, stride {stride} and kind {kind!r} do not fit; expected [B, h, w, C] "
                         f"with at least one position, a positive stride, and one of {', '.join(_POOLS)}")
    if stride == 1 or not x.shape[0]:
        return x[:, ::stride, ::stride]
    planes = x.movedim(-1, 1)
    if kind == "bilinear":
        size = (-(-x.shape[1] // stride), -(-x.shape[2] // stride))
        pooled = F.interpolate(planes, size=size, mode="bilinear", align_corners=False)
    elif kind == "max":
        pooled = F.max_pool2d(planes, stride, ceil_mode=True)
    else:
        pooled = F.avg_pool2d(planes, stride, ceil_mode=True, count_include_pad=False)
    return pooled.movedim(1, -1)


def repeat_frames(x: Tensor, frames: int) -> Tensor:
    """x [B, T, ...] -> [B, frames, ...]: frame t is floor(t T / frames), so a picture (T = 1) is repeated and a clip that is too
    short shows its frames longer, in order. A clip of `frames` or more is returned as it is."""
    if x.ndim < 2 or x.shape[1] < 1 or frames < 1:
        raise ValueError(f"repeat_frames: x {tuple(x.shape)} to {frames} frames; expected [B, T, ...] with T and frames at least 1")
    if x.shape[1] >= frames:
        return x
    return x[:, torch.arange(frames, device=x.device) * x.shape[1] // frames]
