"""Attention with a block memory in plain torch. Letters as in `vlm.ops.block_memory`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm.ops.tokens_reference import falling

Far = Literal["fixed", "absolute"]
ReadBlock = Callable[[int], tuple[Tensor, Tensor]]
"""Number of a block -> its keys and values [G, block, D]."""


@dataclass(frozen=True)
class MemoryShape:
    """What a block memory sees; see `vlm.attention.BlockMemoryOptions` for the meaning of each number."""

    n_init: int
    n_local: int
    block: int
    topk: int
    representatives: int
    chunk: int
    far: Far = "fixed"
    rope_theta: float = 10000.0

    def blocks(self, start: int) -> int:
        """Whole blocks behind the first tokens of which no query from position `start` on has a token in its window."""
        return max(0, max(0, start - self.n_local + 1) - self.n_init) // self.block

    def first(self, block: int) -> int:
        """Place of the first token of a block; of the block after the last, that of what is in no block yet."""
        return self.n_init + block * self.block


class MemoryRead(NamedTuple):
    """out [H, n, D]; score [H, S + n] and means [H, C', D] as they are afterwards; chosen int32 [chunks, K]: the blocks that
    each chunk looked at, ascending, then -1."""

    out: Tensor
    score: Tensor
    means: Tensor
    chosen: Tensor


def block_memory_reference(
    q: Tensor, keys: Tensor, values: Tensor, score: Tensor, means: Tensor, *, shape: MemoryShape, read_block: ReadBlock | None = None
) -> MemoryRead:
    """Same contract as `vlm.ops.block_memory`, in any type and on any device, chunk by chunk.

    read_block: where chosen blocks are taken from; the store when none.
    """
    count, start = q.shape[1], keys.shape[1] - q.shape[1]
    begin = start - score.shape[1]
    score = torch.nn.functional.pad(score, (0, count))
    starts = range(start, start + count, shape.chunk)
    places = min(shape.topk, shape.blocks(starts[-1]) if starts else means.shape[1])
    parts, lists = [], []
    for first in starts:
        end = min(first + shape.chunk, start + count)
        chunk = q[:, first - start : end - start]
        blocks = shape.blocks(first)
        means = _form_blocks(shape, keys, score, begin, means, blocks)
        far = _rotate(chunk, torch.full((end - first,), shape.n_local - 1, device=q.device), shape)
        chosen = _look_up(shape, far, means, blocks)
        out, shares = _attend(shape, chunk, far, keys, values, chosen, first, read_block)
        gone = max(0, first - shape.n_local + 1)
        score[:, gone - begin : end - begin] += shares
        parts.append(out)
        lists.append(torch.nn.functional.pad(chosen.to(torch.int32), (0, places - chosen.shape[0]), value=-1))
    if not parts:
        return MemoryRead(torch.zeros_like(q), score, means, torch.zeros(0, places, dtype=torch.int32, device=q.device))
    return MemoryRead(torch.cat(parts, 1), score, means, torch.stack(lists))


def _attend(
    shape: MemoryShape, q: Tensor, far: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, start: int, read_block: ReadBlock | None
) -> tuple[Tensor, Tensor]:
    """q [H, n, D] from position `start` on, `far` the same at the fixed distance -> (out [H, n, D], what the keys of the window
    were given [H, near]); the store may hold more, which is not looked at."""
    end, device = start + q.shape[1], q.device
    gone = max(0, start - shape.n_local + 1)  # tokens that no query of this chunk has in its window
    blocks = shape.blocks(start)
    initial, position = min(shape.n_init, end), torch.arange(start, end, device=device)
    near = torch.arange(gone, end, device=device)
    loose = min(shape.first(blocks), end)  # evicted, and in no block yet
    rest = torch.arange(loose, max(loose, end - shape.n_local), device=device)
    inside = (shape.n_init + chosen[:, None] * shape.block + torch.arange(shape.block, device=device)).flatten()
    behind = torch.cat([torch.arange(initial, device=device), inside, rest])
    if read_block is None:
        far_keys, far_values = keys[:, behind], values[:, behind]
    else:
        pairs = [read_block(block) for block in chosen.tolist()]
        ends = slice(loose, loose + len(rest))
        far_keys, far_values = (torch.cat([store[:, :initial], *(pair[side] for pair in pairs), store[:, ends]], 1)
                                for side, store in enumerate((keys, values)))
    lag_near, lag_far = position[:, None] - near, position[:, None] - behind
    # Only differences of positions count, so the window turns by the first of its own: one table serves every chunk.
    logits_near = _grouped(_turn(q, start - gone, shape), _turn(keys[:, gone:end], 0, shape).mT)
    if shape.far == "fixed":
        logits_far = _grouped(far, far_keys.mT)
    else:
        logits_far = _grouped(_rotate(q, position, shape), _rotate(far_keys, behind, shape).mT)
    logits = torch.cat([
        logits_near.masked_fill_((lag_near < 0) | (lag_near >= shape.n_local), -torch.inf),
        logits_far.masked_fill_(lag_far < shape.n_local, -torch.inf),  # what is in the window is not counted twice
    ], -1).mul_(q.shape[2] ** -0.5)
    wide = torch.promote_types(q.dtype, torch.float32)
    weights = torch.softmax(logits.to(wide), -1).to(q.dtype)  # one softmax over both branches
    return _grouped(weights, torch.cat([values[:, gone:end], far_values], 1)), weights[..., : end - gone].sum(1)


def _form_blocks(shape: MemoryShape, keys: Tensor, score: Tensor, begin: int, means: Tensor, blocks: int) -> Tensor:
    """Representatives of the blocks that have left the window since; score: from position `begin` on."""
    repeat, most = score.shape[0] // keys.shape[0], min(shape.representatives, shape.block)
    for block in range(means.shape[1], blocks):
        first = shape.first(block)
        given = score[:, first - begin : first - begin + shape.block]
        best = falling(given)[:, :most]  # of equal ones the earlier
        own = keys[:, first : first + shape.block].repeat_interleave(repeat, 0)
        means = torch.cat([means, own.gather(1, best[..., None].expand(-1, -1, own.shape[2])).mean(1, keepdim=True)], 1)
    return means


def _look_up(shape: MemoryShape, far: Tensor, means: Tensor, blocks: int) -> Tensor:
    """The blocks whose representatives fit the mean query best, ascending; the choice is shared by all heads."""
    if blocks <= shape.topk:
        return torch.arange(blocks, device=far.device)
    fit = (means[:, :blocks] @ far.mean(1)[..., None])[..., 0].sum(0)
    return falling(fit)[: shape.topk].sort().values


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a [H, n, K] times b [G, K, M], H/G heads to each of b: [H, n, M], and no copy of b for each head."""
    return (a.reshape(b.shape[0], a.shape[0] // b.shape[0] * a.shape[1], a.shape[2]) @ b).view(a.shape[0], a.shape[1], b.shape[2])


def _rotate(x: Tensor, position: Tensor, shape: MemoryShape) -> Tensor:
    """Rotary positions [n] on x [H, n, D], half-split layout."""
    return _turned(x, *_cosines(position, x.shape[2], shape.rope_theta, x.dtype))


def _turn(x: Tensor, first: int, shape: MemoryShape) -> Tensor:
    """The same for positions from `first` on, all below n_local + chunk: from a table."""
    if torch.compiler.is_compiling():
        return _rotate(x, torch.arange(first, first + x.shape[1], device=x.device), shape)
    cos, sin = angle_table(shape.n_local + shape.chunk, x.shape[2], shape.rope_theta, x.dtype, x.device)
    return _turned(x, cos[first : first + x.shape[1]], sin[first : first + x.shape[1]])


def _cosines(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, D] of the angles at positions [n], made in float64."""
    half = torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / width
    angle = position[:, None].double() * theta**-half
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angle.cos(), angle.sin()))
    return cos, sin


@lru_cache(maxsize=8)
def angle_table(length: int, width: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [length, D] of the positions from 0 on."""
    return _cosines(torch.arange(length, device=device), width, theta, dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
