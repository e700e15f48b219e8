"""Key blocks chosen by hierarchical search, and exact attention over chosen blocks, with their plain-torch twins.

B batch, H query heads, G key/value heads (H a multiple of G), N queries, M keys, D width, V value width, P = ceil(N / block_q)
blocks of queries, K places of a list. Query i stands at position i + M - N and sees the keys up to it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlm.ops import masks
from vlm.ops.attention import attention
from vlm.ops.attention_reference import default_scale
from vlm.ops.backend import one_device, under_autocast, use_native
from vlm.ops.selection_native import REPRESENTATIVES, native_block_sparse, native_select_hierarchical
from vlm.ops.selection_reference import (
    BlockList,
    dense_mask,
    select_hierarchical_reference,
)

__all__ = ["BlockList", "block_sparse_attention", "dense_mask", "select_hierarchical", "select_hierarchical_reference"]


@torch.no_grad()
def select_hierarchical(
    q: Tensor,
    k: Tensor,
    *,
    budget: int,
    block_q: int = 32,
    block_k: int = 2,
    window: int = 128,
    sinks: int = 16,
    row_step: int = 2,
    representative: Literal["first", "center"] = "center",
) -> tuple[BlockList, Tensor]:
    """q [B, H, N, D], k [B, G, M, D] -> (lists of blocks, representatives scored by list int64 [B, H, P]).

    budget: keys chosen for a block of queries, in whole blocks of `block_k` (budget // block_k of them), of those that lie
        between the first `sinks` keys and the last `window` before the queries; these two are kept always. All are kept
        where there are no more than the budget.
    row_step: one query of so many takes part in the search. representative: the block of an interval that is scored.

    The search takes about 2 budget log2(M / budget) products for a block of queries instead of M; it relies on keys that
    lie together being alike. Keys are compared as given: rotate them first. No gradient flows through the choice.
    Raises ValueError on shapes or numbers that do not fit. Source: hip.
    """
    _check(q, k)
    if representative not in REPRESENTATIVES:
        raise ValueError(f"select_hierarchical: representative is {representative!r}; expected 'first' or 'center'")
    if min(budget, window, sinks) < 0 or row_step < 1 or not (1 <= block_q <= 256 and 1 <= block_k <= 256):
        raise ValueError("select_hierarchical: budget, window and sinks must not be negative, row_step at least 1, blocks 1 to 256")
    chosen = budget // block_k
    if not use_native(q, k):
        return select_hierarchical_reference(q, k, chosen=chosen, block_q=block_q, block_k=block_k, window=window, sinks=sinks,
                                             row_step=row_step, representative=representative)
    index, count, scored = native_select_hierarchical(q.float(), k.float(), chosen, block_q, block_k, window, sinks, row_step,
                                                      REPRESENTATIVES[representative])
    return BlockList(index, count, block_q, block_k), scored


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockList, *, scale: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """softmax(scale * q k^T + bias) v over the keys that a query sees in the blocks of its list: [B, H, N, V].

    q [B, H, N, D], k [B, G, M, D], v [B, G, M, V]; bias broadcastable to [B, H, N, M]. A query without any key gets 0.
    Without gradients and bias the native core gathers the listed keys. Otherwise the lists are the mask of exact attention,
    forward and backward: its kernels skip the tiles that no list names and hold no [B, H, N, M]. Raises ValueError on shapes that do not fit. Source: hip.
    """
    q, k, v = under_autocast(q, k, v)
    _check(q, k)
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.dtype != k.dtype:
        raise ValueError(f"block_sparse_attention: k {k.dtype} {tuple(k.shape)} and v {v.dtype} {tuple(v.shape)} do not fit")
    one_device("block_sparse_attention", q, k, v, blocks.index, blocks.count, bias)
    lists = (*q.shape[:2], -(-q.shape[2] // blocks.block_q))
    if blocks.count.shape != lists or blocks.index.shape[:3] != lists:
        raise ValueError(f"block_sparse_attention: the lists are {tuple(blocks.count.shape)}, expected {lists}")
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if learns or bias is not None or not use_native(q, k, v):
        listed = masks.BlockList(blocks.index, blocks.count, blocks.block_q, blocks.block_k)
        return attention(q, k, v, causal=True, bias=bias, mask=listed, scale=scale)
    out, _ = native_block_sparse(q.float(), k.float(), v.float(), blocks.index, blocks.count, blocks.block_q, blocks.block_k,
                                 default_scale(q.shape[3]) if scale is None else scale)
    return out.to(q.dtype)


def _check(q: Tensor, k: Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"selection wants q [B, H, N, D] and k [B, G, M, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"selection: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"selection: q and k must share one floating type, got {q.dtype} and {k.dtype}")
