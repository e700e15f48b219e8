"""Hierarchical selection in plain torch, and block lists as masks. Letters as in `vlm.ops.selection`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlm.ops.tokens_reference import falling

Representative = Literal["first", "center"]


@dataclass(frozen=True)
class BlockList:
    """Key blocks of every block of queries: index int32 [B, H, P, K] ascending, -1 behind the count; count int32 [B, H, P]."""

    index: Tensor
    count: Tensor
    block_q: int
    block_k: int


def capacity_of(keys: int, chosen: int, block_q: int, block_k: int, window: int, sinks: int) -> int:
    """Places that every list has."""
    return min(-(-keys // block_k), chosen + -(-sinks // block_k) + (window + block_q) // block_k + 2)


def dense_mask(blocks: BlockList, queries: int, keys: int) -> Tensor:
    """bool [B, H, N, M]: keys of the listed blocks, causal or not."""
    total = -(-keys // blocks.block_k)
    held = torch.zeros((*blocks.count.shape, total + 1), dtype=torch.bool, device=blocks.index.device)
    held.scatter_(3, torch.where(blocks.index < 0, total, blocks.index).long(), True)
    mask = held[..., :total].repeat_interleave(blocks.block_k, 3)[..., :keys]
    return mask.repeat_interleave(blocks.block_q, 2)[:, :, :queries]


def select_hierarchical_reference(
    q: Tensor, k: Tensor, *, chosen: int, block_q: int, block_k: int, window: int, sinks: int, row_step: int,
    representative: Representative,
) -> tuple[BlockList, Tensor]:
    """Same contract as `vlm.ops.select_hierarchical` with `chosen` = budget // block_k, in any type and on any device."""
    batch, heads, queries, _ = q.shape
    keys, device = k.shape[2], q.device
    offset, total = keys - queries, -(-keys // block_k)
    lists = -(-queries // block_q)
    index = torch.full((batch, heads, lists, capacity_of(keys, chosen, block_q, block_k, window, sinks)), -1,
                       dtype=torch.int32, device=device)
    count = torch.zeros((batch, heads, lists), dtype=torch.int32, device=device)
    scored = torch.zeros((batch, heads, lists), dtype=torch.int64, device=device)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide).repeat_interleave(heads // k.shape[1], 1)
    for block in range(lists):
        i0, i1 = block * block_q, min(queries, (block + 1) * block_q)
        last = min(keys - 1, i1 - 1 + offset)
        seen = 0 if last < 0 else last // block_k + 1
        low = min(seen, total, -(-sinks // block_k))
        near = seen if window == 0 else min(seen, max(0, i0 + offset - window + 1) // block_k)
        n = max(0, near - low)
        parts = [torch.arange(low, device=device).expand(batch, heads, -1)]
        if n <= chosen:
            parts.append(torch.arange(low, low + n, device=device).expand(batch, heads, -1))
        elif chosen:
            rows = torch.arange(i0, i1, row_step, device=device)
            found, evaluated = _search(q[:, :, rows], rows + offset, k, chosen, low, n, block_k, representative)
            parts.append(found + low)
            scored[:, :, block] = evaluated
        parts.append(torch.arange(max(low, near), seen, device=device).expand(batch, heads, -1))
        whole = torch.cat(parts, -1)
        index[:, :, block, : whole.shape[-1]] = whole.to(torch.int32)
        count[:, :, block] = whole.shape[-1]
    return BlockList(index, count, block_q, block_k), scored


def _search(q: Tensor, position: Tensor, k: Tensor, m: int, low: int, n: int, block_k: int,
            representative: Representative) -> tuple[Tensor, Tensor]:
    """`m` of n blocks that begin at `low`, ascending from 0: ([B, H, m], representatives scored [B, H]).

    q [B, H, R, D] at positions [R], k [B, H, M, D].
    """
    batch, heads, keys = q.shape[0], q.shape[1], k.shape[2]
    edges = torch.arange(m + 1, device=q.device) * n // m
    first, end = (t.expand(batch, heads, m) for t in (edges[:-1], edges[1:]))
    evaluated = torch.zeros((batch, heads), dtype=torch.int64, device=q.device)
    for _ in range((-(-n // m) - 1).bit_length()):  # so many halvings of the longest; a round over lengths of 1 changes nothing
        going = (end - first > 1).any(-1)
        middle = torch.where(end - first > 1, first + (end - first) // 2, end)
        halves, stops = torch.stack([first, middle], -1).flatten(2), torch.stack([middle, end], -1).flatten(2)
        real = stops > halves
        at = halves if representative == "first" else halves + (stops - halves) // 2
        places = (low + at)[..., None] * block_k + torch.arange(block_k, device=q.device)
        there = (places < keys) & real[..., None]
        flat = places.clamp(max=keys - 1).flatten(2)
        logits = q @ k.gather(2, flat[..., None].expand(-1, -1, -1, k.shape[3])).mT  # [B, H, R, 2 m block_k]
        sees = there.flatten(2)[:, :, None] & (flat[:, :, None] <= position[:, None])
        score = logits.masked_fill(~sees, -torch.inf).amax(2).unflatten(-1, (-1, block_k)).amax(-1)
        score = score.clamp(min=torch.finfo(score.dtype).min).masked_fill(~real, -torch.inf)  # never one that is not there
        best = falling(score)[..., :m].sort(-1).values
        first, end = halves.gather(-1, best), stops.gather(-1, best)
        evaluated = evaluated + torch.where(going, real.sum(-1), 0)
    return first, evaluated
