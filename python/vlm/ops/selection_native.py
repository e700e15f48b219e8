"""Native selection of key blocks and attention over them as torch operators; neither has a gradient.

B batch, H query heads, G key heads, N queries, M keys, D width, V value width, P blocks of queries, K places of a list.
All float32 on the CPU.
"""

import torch
from torch import Tensor

from vlm.ops.backend import core
from vlm.ops.selection_reference import capacity_of

REPRESENTATIVES: dict[str, int] = {"first": 0, "center": 1}


def _readable(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _view(t: Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _sizes(q: Tensor, k: Tensor, block_q: int, block_k: int) -> tuple[int, ...]:
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], k.shape[2] - q.shape[2], block_q, block_k)


@torch.library.custom_op("vlm::select_hierarchical", mutates_args=(), device_types="cpu")
def native_select_hierarchical(
    q: Tensor, k: Tensor, chosen: int, block_q: int, block_k: int, window: int, sinks: int, row_step: int, representative: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, N, D], k [B, G, M, D] -> index int32 [B, H, P, K], count int32 [B, H, P], representatives scored int64 [B, H, P]."""
    q, k = _readable(q), _readable(k)
    index, count, scored = _lists(q, k, chosen, block_q, block_k, window, sinks)
    core().select_hierarchical(
        sizes=_sizes(q, k, block_q, block_k), q=_view(q), k=_view(k), budget=chosen, window=window, sinks=sinks, row_step=row_step,
        capacity=index.shape[3], representative=representative, indices=index.data_ptr(), counts=count.data_ptr(),
        evaluations=scored.data_ptr(), threads=torch.get_num_threads(),
    )
    return index, count, scored


def _lists(q: Tensor, k: Tensor, chosen: int, block_q: int, block_k: int, window: int, sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    lists = (q.shape[0], q.shape[1], -(-q.shape[2] // block_q))
    capacity = capacity_of(k.shape[2], chosen, block_q, block_k, window, sinks)
    return (q.new_empty((*lists, capacity), dtype=torch.int32), q.new_empty(lists, dtype=torch.int32),
            q.new_empty(lists, dtype=torch.int64))


@native_select_hierarchical.register_fake
def _(q: Tensor, k: Tensor, chosen: int, block_q: int, block_k: int, window: int, sinks: int, row_step: int,
      representative: int) -> tuple[Tensor, Tensor, Tensor]:
    return _lists(q, k, chosen, block_q, block_k, window, sinks)


@torch.library.custom_op("vlm::block_sparse_attention", mutates_args=(), device_types="cpu")
def native_block_sparse(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, block_q: int, block_k: int, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V], index int32 [B, H, P, K], count int32 [B, H, P]
    -> out [B, H, N, V], lse [B, H, N]."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    index, count = index.to(torch.int32).contiguous(), count.to(torch.int32).contiguous()
    out, lse = _attended(q, v)
    core().block_sparse_forward(
        sizes=_sizes(q, k, block_q, block_k), q=_view(q), k=_view(k), v=_view(v), value_width=v.shape[3], capacity=index.shape[3],
        scale=scale, indices=index.data_ptr(), counts=count.data_ptr(), out=_view(out), lse=lse.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return out, lse


def _attended(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3])).transpose(1, 2), q.new_empty(q.shape[:3])


@native_block_sparse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, block_q: int, block_k: int,
      scale: float) -> tuple[Tensor, Tensor]:
    return _attended(q, v)
