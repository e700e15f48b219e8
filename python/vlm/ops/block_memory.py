"""Attention of one row to a window and to chosen blocks behind it, with its plain-torch twin.

H query heads, G key and value heads (H a multiple of G), n new positions, T positions in all, D head width (even), S positions
that have a score, C blocks that have representatives, K places of a list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import under_autocast, use_native
from vlm.ops.block_memory_native import native_block_memory
from vlm.ops.block_memory_reference import MemoryRead, MemoryShape, ReadBlock, block_memory_reference

__all__ = ["MemoryRead", "MemoryShape", "block_memory", "block_memory_reference", "reads_natively"]


def reads_natively(q: Tensor) -> bool:
    """Whether the native core computes the call. In half precision it would turn the whole store into float32 for every call,
    so it does not, unless told to."""
    return use_native(q, prefer_torch=q.dtype != torch.float32)


@torch.no_grad()
def block_memory(
    q: Tensor, keys: Tensor, values: Tensor, score: Tensor, means: Tensor, *, shape: MemoryShape, read_block: ReadBlock | None = None
) -> MemoryRead:
    """q [H, n, D]: the last n of the T positions of keys, values [G, T, D]; none rotated. No gradients.

    score [H, S]: attention that the last S of the T - n positions before got inside the window. means [H, C, D]: representatives of the first
    blocks. Both are those of the call before (zeros [H, 0], [H, 0, D] at first); of its scores those from place
    `shape.first(C)` on are enough once there are blocks. The result depends on where chunks begin: every call starts a new one.
    Under autocast `out` has its type.
    read_block: where the twin takes chosen blocks from; natively they are read where they lie in the store.
    Raises ValueError on shapes that do not fit. Contract: cpp/include/vlm/block_memory.hpp. Source: infllm.
    """
    _check(q, keys, values, score, means, shape)
    kind = under_autocast(q[:0])[0].dtype  # of the result alone: what is kept for the next call keeps its type
    if not reads_natively(q):
        with torch.autocast(q.device.type, enabled=False):
            read = block_memory_reference(q, keys, values, score, means, shape=shape, read_block=read_block)
        return read._replace(out=read.out.to(kind))
    tensors = (q, keys, values, score, means)
    out, grown, added, chosen = native_block_memory(
        *(t.float() for t in tensors), shape.n_init, shape.n_local, shape.block, shape.topk, shape.representatives, shape.chunk,
        shape.far == "absolute", shape.rope_theta,
    )
    after = torch.cat([means, added.to(q.dtype)], 1) if added.shape[1] else means
    return MemoryRead(out.to(kind), grown.to(q.dtype), after, chosen)


def _check(q: Tensor, keys: Tensor, values: Tensor, score: Tensor, means: Tensor, shape: MemoryShape) -> None:
    if q.ndim != 3 or keys.ndim != 3 or keys.shape != values.shape or keys.shape[2] != q.shape[2] or q.shape[1] > keys.shape[1]:
        raise ValueError(f"block memory wants q [H, n, D] and keys, values [G, T, D], got {tuple(q.shape)}, {tuple(keys.shape)}, "
                         f"{tuple(values.shape)}")
    heads, count, width = q.shape
    if keys.shape[0] == 0 or heads % keys.shape[0]:
        raise ValueError(f"block memory: {heads} query heads are not a multiple of {keys.shape[0]} key heads")
    if width == 0 or width % 2:
        raise ValueError(f"block memory: a head of width {width} has no halves to rotate")
    if score.ndim != 2 or score.shape[0] != heads or means.ndim != 3 or means.shape[::2] != (heads, width):
        raise ValueError(f"block memory wants score [{heads}, S] and means [{heads}, C, {width}], got {tuple(score.shape)}, "
                         f"{tuple(means.shape)}")
    if len({t.dtype for t in (q, keys, values, score, means)}) > 1 or not q.is_floating_point():
        raise ValueError("block memory: all tensors must share one floating type")
    start = keys.shape[1] - count
    begin = start - score.shape[1]
    if means.shape[1] > shape.blocks(start) or not 0 <= begin <= min(max(0, start - shape.n_local + 1), shape.first(means.shape[1])):
        raise ValueError(f"block memory: {score.shape[1]} scores and {means.shape[1]} blocks are not those of {start} positions read")
