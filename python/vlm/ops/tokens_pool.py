"""Pooling of token grids by geometry, in plain torch operators that export. Source: core-pool.

B batch, T frames, h x w grid, C width (last). torch is as fast as a kernel of our own would be: these are small matrix
products and permutations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

ShuffleOrder = Literal["block-major", "channel-major"]


def pooling_matrix(size: int, bins: int, *, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """[bins, size]: row o averages [floor(o * size / bins), ceil((o + 1) * size / bins)); bins may overlap."""
    o, i = torch.arange(bins, device=device)[:, None], torch.arange(size, device=device)[None, :]
    inside = (i >= o * size // bins) & (i < -(-(o + 1) * size // bins))
    member = inside.to(torch.float64)
    return (member / member.sum(1, keepdim=True)).to(dtype or torch.get_default_dtype())


def adaptive_pool(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Adaptive average over the axes after the batch: x [B, n1, .., C] -> [B, m1, .., C], one m for each n.

    Two axes for pictures (h, w), three for clips (T, h, w); equal to torch's `adaptive_avg_pool2d` and `3d`, and made of
    one matrix product an axis, so it exports for any sizes that are fixed in the graph.
    """
    if x.ndim != len(shape) + 2 or min(x.shape[1:-1], default=1) < 1 or min(shape, default=1) < 1:
        raise ValueError(f"adaptive_pool: x {tuple(x.shape)} does not fit the shape {tuple(shape)}; expected [B, *axes, C] "
                         "with at least one position an axis")
    for axis, bins in enumerate(shape, 1):
        if x.shape[axis] != bins:
            matrix = pooling_matrix(x.shape[axis], bins, dtype=x.dtype, device=x.device)
            x = (matrix @ x.flatten(axis + 1).flatten(0, axis - 1)).unflatten(0, x.shape[:axis]).unflatten(-1, x.shape[axis + 1:])
    return x


def pixel_shuffle_tokens(x: Tensor, r: int, *, order: ShuffleOrder = "block-major") -> Tensor:
    """Space to depth: x [B, h, w, C] -> [B, h / r, w / r, r * r * C].

    order "block-major": channel (dy * r + dx) * C + c, as ONNX SpaceToDepth; "channel-major": c * r * r + dy * r + dx, as
    torch's pixel_unshuffle. `pixel_shuffle_permutation` leads from one to the other.
    """
    _divides("pixel_shuffle_tokens", x, r, order)
    b, h, w, c = x.shape
    blocks = x.reshape(b, h // r, r, w // r, r, c)
    blocks = blocks.permute(0, 1, 3, 2, 4, 5) if order == "block-major" else blocks.permute(0, 1, 3, 5, 2, 4)
    return blocks.reshape(b, h // r, w // r, r * r * c)


def pixel_unshuffle_tokens(x: Tensor, r: int, *, order: ShuffleOrder = "block-major") -> Tensor:
    """The inverse of `pixel_shuffle_tokens`: x [B, h, w, r * r * C] -> [B, h * r, w * r, C]."""
    if x.ndim != 4 or r < 1 or x.shape[3] % (r * r) or order not in ("block-major", "channel-major"):
        raise ValueError(f"pixel_unshuffle_tokens: x {tuple(x.shape)}, r {r} and order {order!r} do not fit")
    b, h, w, c = x.shape[0], x.shape[1], x.shape[2], x.shape[3] // (r * r)
    blocks = x.reshape(b, h, w, r, r, c) if order == "block-major" else x.reshape(b, h, w, c, r, r).permute(0, 1, 2, 4, 5, 3)
    return blocks.permute(0, 1, 3, 2, 4, 5).reshape(b, h * r, w * r, c)


def pixel_shuffle_permutation(width: int, r: int) -> Tensor:
    """[r * r * C] int64: `block_major[..., p]` is channel-major. Applied to the columns of a linear map it converts weights."""
    return torch.arange(r * r * width).view(r * r, width).T.reshape(-1)


def progressive_pool(x: Tensor, *, group: int, stride_high: int, stride_low: int) -> tuple[Tensor, Tensor]:
    """x [B, T, h, w, C] -> tokens [B, L, C] in time order, and how many each frame gave, int64 [T].

    The first frame of each group of `group` is pooled by stride_high, the others by stride_low: a stride s averages an
    axis n to ceil(n / s) adaptive bins. Source: core-pool (Visual Context Window).
    """
    if x.ndim != 5 or min(group, stride_high, stride_low) < 1:
        raise ValueError(f"progressive_pool wants x [B, T, h, w, C] and positive group and strides, got {tuple(x.shape)}, "
                         f"{group}, {stride_high}, {stride_low}")
    b, t, h, w, c = x.shape
    fine = torch.arange(t) % group == 0
    pooled = {}
    for stride, chosen in ((stride_high, fine), (stride_low, ~fine)):
        frames = x[:, chosen.to(x.device)].flatten(0, 1)
        pooled[stride, bool(chosen is fine)] = adaptive_pool(frames, (-(-h // stride), -(-w // stride))).reshape(b, -1, c)
    high, low = pooled[stride_high, True], pooled[stride_low, False]
    sizes = (-(-h // stride_high) * -(-w // stride_high), -(-h // stride_low) * -(-w // stride_low))
    counts = torch.where(fine, sizes[0], sizes[1])
    # Both kinds lie frame by frame; one index puts them in time order.
    kind = fine.repeat_interleave(counts)
    place = torch.where(kind, kind.cumsum(0) - 1, high.shape[1] + (~kind).cumsum(0) - 1)
    return torch.cat([high, low], 1)[:, place.to(x.device)], counts.to(x.device)


def _divides(name: str, x: Tensor, r: int, order: str) -> None:
    if x.ndim != 4 or r < 1 or x.shape[1] % r or x.shape[2] % r:
        raise ValueError(f"{name}: x {tuple(x.shape)} is not [B, h, w, C] with sides divisible by {r}")
    if order not in ("block-major", "channel-major"):
        raise ValueError(f"{name}: order is {order!r}; expected 'block-major' or 'channel-major'")
