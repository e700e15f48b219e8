"""A block memory of the tokens behind the window, without training: `kind = "block-memory"`. Source: infllm.

One row: H query heads, G key and value heads, n new positions, T positions read so far, D head width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.attention.room import Room
from vlm.config.options import Options
from vlm.ops.block_memory import MemoryShape, block_memory


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
    capacity: int = Field(32, ge=0, description="blocks held beside the store for use, in torch; the result does not depend on it")
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
    """What one row has read. keys (not rotated) and values [G, T, D]: the cold store; score [H, S]: attention that each of the last
    S tokens got inside the window, as far as representatives may still hang on it; means [H, blocks, D]: representatives.

    held: blocks taken from the store, the last used last; loads: how often one was taken. Only the torch path takes any: the native
    core reads chosen blocks where they lie. room: where keys and values lie, if they may grow in place.
    """

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

    def copy(self) -> MemoryState:
        """Another state of the same content: reading on with one does not change the other."""
        return replace(self, held=OrderedDict(self.held))


class BlockMemory(nn.Module):
    """Decoding cache and attention of one layer. Holds no parameters."""

    def __init__(self, options: BlockMemoryOptions) -> None:
        super().__init__()
        self.options = options
        self.shape = MemoryShape(options.n_init, options.n_local, options.block, options.topk, options.representatives, options.chunk,
                                 options.far, options.rope_theta or 10000.0)

    def start(self, heads: int, kv_heads: int, width: int, *, like: Tensor) -> MemoryState:
        """The state of a row of which nothing was read."""
        empty = like.new_zeros(kv_heads, 0, width)
        return MemoryState(empty, empty, like.new_zeros(heads, 0), like.new_zeros(heads, 0, width))

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, state: MemoryState) -> Tensor:
        """q [H, n, D], k, v [G, n, D], not rotated, behind what `state` has read, which grows -> [H, n, D].

        The result depends on where chunks begin: every call starts a new one. Computed by `vlm.ops.block_memory.block_memory`.
        """
        if q.ndim != 3 or k.shape != v.shape or k.shape[1:] != q.shape[1:] or q.shape[0] % k.shape[0]:
            raise ValueError(f"block memory wants q [H, n, D] and k, v [G, n, D], got {tuple(q.shape)}, {tuple(k.shape)}, "
                             f"{tuple(v.shape)}")
        state.append(k, v)
        read = block_memory(q, state.keys, state.values, state.score, state.means, shape=self.shape,
                            read_block=lambda block: self._held(state, block))
        state.means = read.means
        settled = self.shape.first(read.means.shape[1]) if read.means.shape[1] else 0  # no block will ask for those before
        first = max(0, settled - (state.length - read.score.shape[1]))
        state.score = read.score[:, first:].clone() if first else read.score
        return read.out

    def _held(self, state: MemoryState, block: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, taken from the store unless it was used lately."""
        if block in state.held:
            state.held.move_to_end(block)
            return state.held[block]
        own = slice(self.shape.first(block), self.shape.first(block + 1))
        state.loads += 1
        pair = state.keys[:, own].clone(), state.values[:, own].clone()
        if self.options.capacity:
            state.held[block] = pair
            while len(state.held) > self.options.capacity:
                state.held.popitem(last=False)
        return pair
