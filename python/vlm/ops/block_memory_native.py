"""Native attention with a block memory as a torch operator; it has no gradient and changes none of its inputs.

H query heads, G key heads, n queries, T positions, D width, S positions with a score, C blocks that have representatives.
All float32 on the CPU.
"""

import torch
from torch import Tensor

from vlm.ops.backend import core
from vlm.ops.block_memory_reference import MemoryShape, angle_table


def _readable(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _view(t: Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), 0, t.stride(0), t.stride(1))


def _sizes(q: Tensor, keys: Tensor, means: Tensor, shape: MemoryShape) -> tuple[int, int, int]:
    """New blocks, chunks, and places of a list."""
    count = q.shape[1]
    chunks = -(-count // shape.chunk)
    blocks = shape.blocks(keys.shape[1] - count + (chunks - 1) * shape.chunk) if chunks else means.shape[1]
    return blocks - means.shape[1], chunks, min(shape.topk, blocks)


@torch.library.custom_op("vlm::block_memory", mutates_args=(), device_types="cpu")
def native_block_memory(
    q: Tensor, keys: Tensor, values: Tensor, score: Tensor, means: Tensor, n_init: int, n_local: int, block: int, topk: int,
    representatives: int, chunk: int, absolute: bool, rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [H, n, D], keys, values [G, T, D], score [H, S], means [H, C, D] -> out [H, n, D], score [H, S + n], the new representatives
    [H, blocks, D], chosen int32 [chunks, K]."""
    q, keys, values, means = _readable(q), _readable(keys), _readable(values), _readable(means)
    shape = MemoryShape(n_init, n_local, block, topk, representatives, chunk)
    more, chunks, places = _sizes(q, keys, means, shape)
    heads, count, width = q.shape
    grown = torch.cat([score, score.new_zeros(heads, count)], 1)
    out, added, chosen = _results(q, more, chunks, places)
    # Lengths in steps, so that a row which grows does not need a table for every length of it.
    length = -(-keys.shape[1] // 1024) * 1024 if absolute else n_local + chunk
    cosines, sines = angle_table(length, width, rope_theta, torch.float32, q.device)
    core().block_memory_forward(
        sizes=(heads, keys.shape[0], count, keys.shape[1], width), memory=(n_init, n_local, block, topk, representatives, chunk),
        absolute=absolute, scale=width**-0.5, q=_view(q), k=_view(keys), v=_view(values),
        cosines=(cosines.data_ptr(), cosines.stride(0)), sines=(sines.data_ptr(), sines.stride(0)), table_rows=length,
        scored=score.shape[1], score=grown.data_ptr(), means=_view(means), formed=means.shape[1], added=added.data_ptr(), more=more,
        chosen=chosen.data_ptr(), places=places, out=_view(out), threads=torch.get_num_threads(),
    )
    return out, grown, added, chosen


def _results(q: Tensor, more: int, chunks: int, places: int) -> tuple[Tensor, Tensor, Tensor]:
    heads, count, width = q.shape
    return (q.new_empty(count, heads, width).transpose(0, 1), q.new_empty(heads, more, width),
            q.new_empty((chunks, places), dtype=torch.int32))


@native_block_memory.register_fake
def _(
    q: Tensor, keys: Tensor, values: Tensor, score: Tensor, means: Tensor, n_init: int, n_local: int, block: int, topk: int,
    representatives: int, chunk: int, absolute: bool, rope_theta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape = MemoryShape(n_init, n_local, block, topk, representatives, chunk)
    out, added, chosen = _results(q, *_sizes(q, keys, means, shape))
    return out, score.new_empty(score.shape[0], score.shape[1] + q.shape[1]), added, chosen
