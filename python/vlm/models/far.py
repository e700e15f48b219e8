"""The decoder loop where queries do not see every key: `[model.attention]`, with one cache for each way of keeping.

n rows, S new positions, T positions read in all, L layers, H query heads, G key and value heads, D head width.
Rows are read one document at a time without their padding, so that neither padding nor batch mates choose keys.
Sources: hip, infllm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlm.attention import TrunkAttentionOptions, sees_all
from vlm.attention.block_memory import BlockMemory, BlockMemoryOptions, MemoryState
from vlm.attention.hierarchical import Choice, HierarchicalAttention
from vlm.layers import Block, Trunk
from vlm.models.cache import DecoderCache, LayerCache, appended_positions, is_packed, position_after
from vlm.types import Layout

Mix = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] of the rows named -> [B, H, N, V]; the queries are the last N places."""
Choices = list[Choice | None]
"""What every row has chosen at one layer."""


@dataclass
class MemoryCache:
    """What a block memory keeps: states by layer and row. next_position [n, L] int64, as in `DecoderCache`."""

    states: list[list[MemoryState]]
    next_position: Tensor

    def rows(self, index: Tensor) -> MemoryCache:
        """The rows `index` [m] int64: kept, repeated or reordered (beam search)."""
        return MemoryCache([[layer[row].copy() for row in index.tolist()] for layer in self.states], self.next_position[index])

    def joined(self, other: MemoryCache) -> MemoryCache:
        """With the rows of another cache of the same model behind its own; the states are copies, as they grow in place."""
        states = [[state.copy() for state in (*mine, *its)] for mine, its in zip(self.states, other.states, strict=True)]
        return MemoryCache(states, torch.cat([self.next_position, other.next_position]))

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.states for state in layer for t in (state.keys, state.values, state.score, state.means)]

    @property
    def bytes(self) -> int:
        """Bytes of the stores, scores and representatives; blocks held beside the store are not counted."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


@dataclass
class ChosenCache(DecoderCache):
    """Keys and values with what the last token written chose of them: choices by layer, then by row."""

    choices: list[Choices] = field(default_factory=list)

    def rows(self, index: Tensor) -> ChosenCache:
        """The rows `index` [m] int64: kept, repeated or reordered (beam search)."""
        kept, places = super().rows(index), index.tolist()
        return ChosenCache(kept.layers, kept.next_position, kept.cross, [[layer[row] for row in places] for layer in self.choices])

    def joined(self, other: DecoderCache) -> ChosenCache:
        """With the rows of another cache of the same model behind its own; rows that have chosen nothing yet go on so."""
        whole = super().joined(other)
        none: list[Choices] = [[None] * len(other.next_position)] * len(self.choices)
        more = other.choices if isinstance(other, ChosenCache) else none
        choices = [[*mine, *its] for mine, its in zip(self.choices, more, strict=True)]
        return ChosenCache(whole.layers, whole.next_position, whole.cross, choices)

    def tensors(self) -> list[Tensor]:
        return super().tensors() + [choice.index for layer in self.choices for choice in layer if choice is not None]


FarCache = DecoderCache | MemoryCache
Run = tuple[int, Tensor, Tensor]
"""A row, the places of its queries and those of the keys that they may see, both ascending."""


def sees_everything(trunk: Trunk) -> bool:
    """Whether a pass over the trunk, in the mode that it is in, is plain causal attention."""
    options = trunk.options.attention
    if isinstance(options, TrunkAttentionOptions):
        return True  # its own trunk applies it
    return options is None or sees_all(options) or (options.when == "inference" and trunk.training)


def read_far(
    trunk: Trunk, x: Tensor, layout: Layout, cache: FarCache | None, keep_cache: bool, collect: Collection[int]
) -> tuple[Tensor, Tensor, dict[int, Tensor], FarCache | None]:
    """x [n, S, C] behind what the cache has read: (x, position [n, S], hidden states by layer, cache if kept or given).

    Raises ValueError for packed rows with a cache.
    """
    is_packed(layout, appended=cache is not None, continued=keep_cache)
    position = layout.position
    if cache is not None:
        position = appended_positions(cache.next_position[:, :1], layout.mask)
        following = cache.next_position + layout.mask.sum(1, keepdim=True)
    else:
        following = position_after(layout.mask, position)[:, None].expand(-1, len(trunk.blocks)).contiguous()
    options: Any = trunk.options.attention
    hidden = {0: x} if 0 in collect else {}
    if isinstance(options, BlockMemoryOptions):
        assert cache is None or isinstance(cache, MemoryCache)
        theta = options.rope_theta or trunk.options.rope_theta
        memory = options.model_copy(update={"rope_theta": theta}).build()
        x, states = _remember(trunk, memory, x, layout, None if cache is None else cache.states, hidden, collect)
        return x, position, hidden, MemoryCache(states, following) if cache is not None or keep_cache else None
    assert cache is None or isinstance(cache, DecoderCache)
    x, after = _choose(trunk, options.build(), x, layout, position, cache, hidden, collect)
    after.next_position = following
    return x, position, hidden, after if cache is not None or keep_cache else None


class _Steps:
    """Mixes the queries of one layer; where choices are kept, by what their rows chose before: after, what the next token may
    read by, or nothing."""

    def __init__(self, attention: Any, before: Choices | None) -> None:
        self.attention = attention
        self.after = None if before is None else list(before)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rows: Sequence[int]) -> Tensor:
        if self.after is None:
            return self.attention(q, k, v)
        before = [self.after[row] for row in rows]
        together = Choice.joined(before)
        if together is None and any(one is not None for one in before):  # they chose at different steps: each goes on as alone
            return torch.cat([self(q[at : at + 1], k[at : at + 1], v[at : at + 1], [row]) for at, row in enumerate(rows)])
        mixed, choice = self.attention.step(q, k, v, together)
        for at, row in enumerate(rows):
            self.after[row] = None if choice is None else choice.row(at)
        return mixed


def _choose(
    trunk: Trunk, attention: Any, x: Tensor, layout: Layout, position: Tensor, cache: DecoderCache | None,
    hidden: dict[int, Tensor], collect: Collection[int],
) -> tuple[Tensor, DecoderCache]:
    """Every layer keeps all keys, rotated, and its queries choose among them; tokens that are written may share a choice."""
    rotary = trunk.rotary(position)
    mask = layout.mask if cache is None else torch.cat([cache.layers[0].mask, layout.mask], 1)
    whole = bool(mask.all()) and not bool((layout.segment > 0).any())
    runs = None if whole else _runs(layout, mask)
    shares = cache is not None and isinstance(attention, HierarchicalAttention) and attention.options.refresh > 1
    layers, choices = [], []
    for layer, block in enumerate(trunk.blocks):
        assert isinstance(block, Block)
        q, keys, values = block.project(x, rotary)
        own = LayerCache(keys, values, mask) if cache is None else cache.layers[layer].grown(keys, values, mask)
        layers.append(own)
        steps = _Steps(attention, cache.choices[layer] if isinstance(cache, ChosenCache) else [None] * len(x) if shares else None)
        mixed = steps(q, own.keys, own.values, range(len(x))) if runs is None else _by_run(steps, runs, q, own.keys, own.values)
        x = block.finish(x, mixed)
        if steps.after is not None:
            choices.append(steps.after)
        if layer + 1 in collect:
            hidden[layer + 1] = x
    return x, ChosenCache(layers, position, choices=choices) if choices else DecoderCache(layers, position)


def _remember(
    trunk: Trunk, memory: BlockMemory, x: Tensor, layout: Layout, kept: list[list[MemoryState]] | None,
    hidden: dict[int, Tensor], collect: Collection[int],
) -> tuple[Tensor, list[list[MemoryState]]]:
    """Every layer keeps a memory for each row, or for each document of a packed one, whose states are of no further use."""
    runs = _runs(layout, layout.mask)
    states: list[list[MemoryState]] = []
    for layer, block in enumerate(trunk.blocks, start=1):
        assert isinstance(block, Block)
        q, k, v = block.project(x, None)
        if kept is None:
            after = [memory.start(q.shape[1], k.shape[1], q.shape[3], like=k) for _ in range(len(x))]
        else:
            after = [state.copy() for state in kept[layer - 1]]
        mixed = torch.zeros_like(q)
        begun: set[int] = set()
        for row, places, _ in runs:
            if kept is None and row in begun:  # the next document of the row
                after[row] = memory.start(q.shape[1], k.shape[1], q.shape[3], like=k)
            begun.add(row)
            mixed[row][:, places] = memory(q[row][:, places], k[row][:, places], v[row][:, places], after[row]).to(q.dtype)
        x = block.finish(x, mixed)
        states.append(after)
        if layer in collect:
            hidden[layer] = x
    return x, states


def _runs(layout: Layout, mask: Tensor) -> list[Run]:
    """The documents of the rows; mask [n, T], true where there is a key, of which the last S are of this layout."""
    before = mask.shape[1] - layout.mask.shape[1]
    runs: list[Run] = []
    for row in range(len(mask)):
        own = layout.mask[row]
        earlier = mask[row, :before].nonzero()[:, 0]
        for number in layout.segment[row][own].unique().tolist():
            places = (own & (layout.segment[row] == number)).nonzero()[:, 0]
            runs.append((row, places, torch.cat([earlier, places + before])))
    return runs


def _by_run(mix: Mix, runs: Sequence[Run], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `mix`, each run by itself; places of no run get 0."""
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for row, places, seen in runs:
        mixed = mix(q[row : row + 1, :, places], k[row : row + 1, :, seen], v[row : row + 1, :, seen], [row])
        out[row, places] = mixed[0].transpose(0, 1).to(out.dtype)
    return out.transpose(1, 2)
