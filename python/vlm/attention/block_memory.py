"""A block memory of the tokens behind the window, without training: `kind = "block-memory"`. Source: infllm.

One row: H query heads, G key and value heads, n new positions, T positions read so far, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.attention.room import Room
from vlm.config.options import Options


class BlockMemoryOptions(Options):
    """First tokens, a local window, and the blocks behind it that fit the queries best, as if at one fixed distance."""

    kind: Literal["block-memory"] = "block-memory"
    when: Literal["inference"] = Field("inference", description="in a decoder; a training step sees every key: there are no gradients")
    n_init: int = Field(128, ge=0, description="first tokens, always seen")
    n_local: int = Field(4096, ge=1, description="last tokens, seen at their true distance")
    block: int = Field(128, ge=1, description="tokens of a memory block")
    topk: int = Field(16, ge=0, description="blocks that a chunk of queries looks at")
    representatives: int = Field(4, ge=1, description="tokens of a block that stand for it, by the attention that they got")
    chunk: int = Field(512, ge=1, description="queries that share a lookup")
    capacity: int = Field(32, ge=0, description="blocks held beside the store for use; the result does not depend on it")
    far: Literal["fixed", "absolute"] = Field("fixed", description="distance of all beyond the window: n_local - 1, or the true one")
    rope_theta: float | None = Field(None, gt=0, description="base of the rotary positions; default: the decoder's, or 10000")

    @model_validator(mode="after")
    def _fits(self) -> BlockMemoryOptions:
        if self.chunk > self.n_local:
            raise ValueError(f"chunk {self.chunk} is above n_local {self.n_local}: a chunk must fit in the window")
        return self

    def build(self) -> BlockMemory:
        return BlockMemory(self)


@dataclass
class MemoryState:
    """What one row has read. keys (not rotated) and values [G, T, D]: the cold store; score [H, T]: attention that each
    token got inside the window; means [H, blocks, D]: representatives; held: blocks taken from the store, the last used last.
    loads: how often a block was taken from the store. room: where keys and values lie, if they may grow in place."""

    keys: Tensor
    values: Tensor
    score: Tensor
    means: Tensor
    held: OrderedDict[int, tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)
    loads: int = 0
    room: Room | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    def append(self, k: Tensor, v: Tensor) -> None:
        """k, v [G, n, D] behind what was read: a token costs its own bytes, not a copy of all before it."""
        self.room = Room.behind(self.room, self.keys[None], self.values[None], k[None], v[None])
        self.keys, self.values = self.room.keys[0, :, : self.room.used], self.room.values[0, :, : self.room.used]
        self.score = torch.nn.functional.pad(self.score, (0, k.shape[1]))

    def copy(self) -> MemoryState:
        """Another state of the same content: reading on with one does not change the other."""
        return replace(self, held=OrderedDict(self.held))


class BlockMemory(nn.Module):
    """Decoding cache and attention of one layer. Holds no parameters."""

    def __init__(self, options: BlockMemoryOptions) -> None:
        super().__init__()
        self.options = options

    def start(self, heads: int, kv_heads: int, width: int, *, like: Tensor) -> MemoryState:
        """The state of a row of which nothing was read."""
        empty = like.new_zeros(kv_heads, 0, width)
        return MemoryState(empty, empty, like.new_zeros(heads, 0), like.new_zeros(heads, 0, width))

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState) -> Tensor:
        """q [H, n, D], k, v [G, n, D], not rotated, behind what `state` has read, which grows -> [H, n, D].

        The result depends on where chunks begin: every call starts a new one.
        """
        if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or q.shape[0] % k.shape[0]:
            raise ValueError(f"block memory wants q [H, n, D] and k, v [G, n, D], got {tuple(q.shape)}, {tuple(k.shape)}, "
                             f"{tuple(v.shape)}")
        before, chunk = state.length, self.options.chunk
        state.append(k, v)
        parts = [self._read(q[:, s : s + chunk], before + s, state) for s in range(0, q.shape[1], chunk)]
        return torch.cat(parts, 1) if parts else torch.zeros_like(q)

    def _read(self, q: Tensor, start: int, state: MemoryState) -> Tensor:
        """q [H, n, D] at the positions from `start` on; the store may hold more, which is not looked at."""
        own, end = self.options, start + q.shape[1]
        gone = max(0, start - own.n_local + 1)  # tokens that no query of this chunk has in its window
        blocks = max(0, gone - own.n_init) // own.block
        self._form_blocks(state, blocks, q.shape[0] // state.keys.shape[0])
        position = torch.arange(start, end, device=q.device)
        far = self._rotate(q, torch.full_like(position, own.n_local - 1))
        chosen = self._look_up(far, state, blocks)

        near = torch.arange(gone, end, device=q.device)
        loose = min(own.n_init + blocks * own.block, end)  # evicted, and in no block yet
        rest = slice(loose, max(loose, end - own.n_local))
        behind = torch.cat([torch.arange(min(own.n_init, end), device=q.device), *(self._places(b, q.device) for b in chosen),
                            torch.arange(rest.start, rest.stop, device=q.device)])
        held = [self._held(state, block) for block in chosen]
        initial = state.keys[:, : min(own.n_init, end)], state.values[:, : min(own.n_init, end)]
        last = state.keys[:, rest], state.values[:, rest]
        far_keys, far_values = (torch.cat(side, 1) for side in zip(initial, *held, last))

        lag_near, lag_far = position[:, None] - near, position[:, None] - behind
        # Only differences of positions count, so the window turns by the first of its own: one table serves every chunk.
        logits_near = _grouped(self._turn(q, start - gone), self._turn(state.keys[:, gone:end], 0).mT)
        if own.far == "fixed":
            logits_far = _grouped(far, far_keys.mT)
        else:
            logits_far = _grouped(self._rotate(q, position), self._rotate(far_keys, behind).mT)
        logits = torch.cat([
            logits_near.masked_fill_((lag_near < 0) | (lag_near >= own.n_local), -torch.inf),
            logits_far.masked_fill_(lag_far < own.n_local, -torch.inf),  # what is in the window is not counted twice
        ], -1).mul_(q.shape[2] ** -0.5)
        wide = torch.promote_types(q.dtype, torch.float32)
        weights = torch.softmax(logits.to(wide), -1).to(q.dtype)  # one softmax over both branches
        state.score[:, gone:end] += weights[..., : len(near)].sum(1)
        return _grouped(weights, torch.cat([state.values[:, gone:end], far_values], 1))

    def _places(self, block: int, device: torch.device) -> Tensor:
        first = self.options.n_init + block * self.options.block
        return torch.arange(first, first + self.options.block, device=device)

    def _form_blocks(self, state: MemoryState, blocks: int, repeat: int) -> None:
        """Representatives of the blocks that have left the window since."""
        for block in range(state.means.shape[1], blocks):
            places = self._places(block, state.keys.device)
            best = state.score[:, places].topk(min(self.options.representatives, self.options.block), dim=1).indices
            keys = state.keys[:, places].repeat_interleave(repeat, 0)
            mean = keys.gather(1, best[..., None].expand(-1, -1, keys.shape[2])).mean(1, keepdim=True)
            state.means = torch.cat([state.means, mean], 1)

    def _look_up(self, far: Tensor, state: MemoryState, blocks: int) -> list[int]:
        """The blocks whose representatives fit the mean query best, ascending; the choice is shared by all heads."""
        if blocks <= self.options.topk:
            return list(range(blocks))
        score = (state.means[:, :blocks] @ far.mean(1)[..., None])[..., 0].sum(0)
        return sorted(torch.sort(score, descending=True, stable=True).indices[: self.options.topk].tolist())

    def _held(self, state: MemoryState, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, taken from the store unless it was used lately."""
        if block in state.held:
            state.held.move_to_end(block)
            return state.held[block]
        places = self._places(block, state.keys.device)
        state.loads += 1
        pair = state.keys[:, places], state.values[:, places]
        if self.options.capacity:
            state.held[block] = pair
            while len(state.held) > self.options.capacity:
                state.held.popitem(last=False)
        return pair

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Rotary positions [n] on x [H, n, D], half-split layout."""
        return _turned(x, *_cosines(position, x.shape[2], self._theta, x.dtype))

    def _turn(self, x: Tensor, first: int) -> Tensor:
        """The same for positions from `first` on, all below n_local + chunk: from a table."""
        cos, sin = _table(self.options.n_local + self.options.chunk, x.shape[2], self._theta, x.dtype, x.device)
        return _turned(x, cos[first : first + x.shape[1]], sin[first : first + x.shape[1]])

    @property
    def _theta(self) -> float:
        return self.options.rope_theta or 10000.0


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """a [H, n, K] times b [G, K, M], H/G heads to each of b: [H, n, M], and no copy of b for each head."""
    return (a.reshape(b.shape[0], -1, a.shape[2]) @ b).view(a.shape[0], a.shape[1], b.shape[2])


def _cosines(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [n, D] of the angles at positions [n], made in float64."""
    half = torch.arange(0, width, 2, device=position.device, dtype=torch.float64) / width
    angle = position[:, None].double() * theta**-half
    cos, sin = (torch.cat([t, t], -1).to(dtype) for t in (angle.cos(), angle.sin()))
    return cos, sin


@lru_cache(maxsize=8)
def _table(length: int, width: int, theta: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return _cosines(torch.arange(length, device=device), width, theta, dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
