"""A trunk whose mixer keeps a state: no keys and values, so a token costs the same however long the row.

n rows, S positions, L layers, C width. Sources: transnormer, tokenunify.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.attention.mixer import MixerShape, Places, State
from vlm.layers import FeedForward, Trunk, TrunkOptions, norm_of
from vlm.models.cache import appended_positions, is_packed, position_after
from vlm.types import Layout


@dataclass
class RecurrentCache:
    """The states of the layers after the rows read so far; next_position [n, L] int64, as in `DecoderCache`."""

    states: list[State]
    next_position: Tensor

    def rows(self, index: Tensor) -> RecurrentCache:
        """The rows `index` [m] int64: kept, repeated or reordered (beam search)."""
        return RecurrentCache([tuple(t[index] for t in state) for state in self.states], self.next_position[index])

    def joined(self, other: RecurrentCache) -> RecurrentCache:
        """With the rows of another cache of the same model behind its own."""
        states = [tuple(torch.cat(pair) for pair in zip(mine, its)) for mine, its in zip(self.states, other.states, strict=True)]
        return RecurrentCache(states, torch.cat([self.next_position, other.next_position]))

    def tensors(self) -> list[Tensor]:
        return [t for state in self.states for t in state]

    @property
    def bytes(self) -> int:
        """Bytes of the states: the same after every token."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class MixerBlock(nn.Module):
    """Pre-norm residual block around a mixer."""

    def __init__(self, options: TrunkOptions, layer: int) -> None:
        super().__init__()
        assert options.mixer is not None
        head_width = options.head_width or options.width // options.heads
        shape = MixerShape(options.width, options.heads, options.kv_heads or options.heads, head_width, layer, options.depth,
                           options.norm_eps)
        self.norm1 = norm_of(options.norm, options.width, options.norm_eps)
        self.mixer: Any = options.mixer.build(shape)
        self.norm2 = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)
        self.ffn.initialise(options.width, options.depth)

    def forward(self, x: Tensor, places: Places, state: State | None = None) -> tuple[Tensor, State]:
        mixed, state = self.mixer(self.norm1(x), places, state)
        x = x + mixed
        return x + self.ffn(self.norm2(x)), state


class RecurrentTrunk(Trunk):
    """A stack of mixer blocks, always causal. `recompute` trades time for memory in backward."""

    def __init__(self, options: TrunkOptions) -> None:
        nn.Module.__init__(self)
        self.options = options
        self.blocks = nn.ModuleList(MixerBlock(options, layer) for layer in range(options.depth))
        self.recompute = False

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        key_mask: Tensor | None = None,
        segment: Tensor | None = None,
        position: Tensor | None = None,
        collect: Collection[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """As `Trunk.forward`. Raises ValueError unless causal."""
        if not causal:
            raise ValueError("a recurrent mixer reads from left to right: it cannot see later positions")
        if position is None:
            position = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        x, hidden, _ = self.read(x, Places(position, key_mask, segment), None, collect, stop)
        return x, hidden

    def read(
        self, x: Tensor, places: Places, states: list[State] | None, collect: Collection[int] = (), stop: int | None = None
    ) -> tuple[Tensor, dict[int, Tensor], list[State]]:
        """x [n, S, C] behind what the states have read -> (x, hidden states by layer, the states after it)."""
        hidden = {0: x} if 0 in collect else {}
        after: list[State] = []
        for layer, block in enumerate(self.blocks[:stop], start=1):
            before = None if states is None else states[layer - 1]
            if self.recompute and torch.is_grad_enabled():
                x, state = checkpoint(block, x, places, before, use_reentrant=False)
            else:
                x, state = block(x, places, before)
            after.append(state)
            if layer in collect:
                hidden[layer] = x
        return x, hidden, after

    def run(
        self, x: Tensor, layout: Layout, cache: RecurrentCache | None, keep_cache: bool, collect: Collection[int]
    ) -> tuple[Tensor, Tensor, dict[int, Tensor], RecurrentCache | None]:
        """The decoder loop: (x, position [n, S], hidden states by layer, cache if kept or given).

        Raises ValueError for packed rows with a cache.
        """
        packed = is_packed(layout, appended=cache is not None, continued=keep_cache)
        mask = None if bool(layout.mask.all()) else layout.mask
        position = layout.position
        if cache is not None:
            position = appended_positions(cache.next_position[:, :1], layout.mask)
        places = Places(position, mask, layout.segment if packed else None)
        x, hidden, states = self.read(x, places, None if cache is None else cache.states, collect)
        if cache is not None:
            return x, position, hidden, RecurrentCache(states, cache.next_position + layout.mask.sum(1, keepdim=True))
        if not keep_cache:
            return x, position, hidden, None
        following = position_after(layout.mask, position)
        return x, position, hidden, RecurrentCache(states, following[:, None].expand(-1, len(states)).contiguous())

