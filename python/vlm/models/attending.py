"""A trunk whose attention has a mask, a position bias or global tokens; its cache may roll.

n rows, N positions, T cached positions, C width, H query heads, G key and value heads, D head width, S first tokens.
Sources: lm-infinite (window, first tokens, capped distance), budget-longformer (symmetric window, global tokens).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm import ops
from vlm.attention import TrunkAttentionOptions
from vlm.attention.room import LEAST_ROOM
from vlm.layers import Attention, FeedForward, Trunk, TrunkOptions, norm_of, rotary_tables, rotate
from vlm.models.cache import LayerCache, appended_positions, is_packed, position_after
from vlm.models.joining import joined_left
from vlm.models.sight import Ranks, Sight, sight_of
from vlm.models.unprojected import read_unprojected, reads_unprojected
from vlm.ops import masks
from vlm.types import Layout

Rotary = tuple[Tensor, Tensor]
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Turns:
    """Rotary tables: of the positions, and of the one distance at which far first tokens stand (None: at their own)."""

    near: Rotary | None
    far: Rotary | None


class AttendingBlock(nn.Module):
    """Pre-norm residual block under a `Sight`."""

    def __init__(self, options: TrunkOptions, attention: TrunkAttentionOptions) -> None:
        super().__init__()
        self.norm1 = norm_of(options.norm, options.width, options.norm_eps)
        self.attention = Attention(options)
        self.core = attention.core(options.heads)
        self.global_attention = Attention(options) if attention.global_projections else None
        if self.global_attention is not None:
            del self.global_attention.out  # one projection out, after the rows are put together
        self.norm2 = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)

    def forward(self, x: Tensor, sight: Sight, turns: Turns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [n, N, C] -> (x, keys, values [n, G, N, D], the keys that far queries read: unrotated where distances are capped)."""
        mixed, near, v, distant = self.look(self.norm1(x), sight, turns)
        return self.finish(x, mixed), near, v, distant

    def look(self, y: Tensor, sight: Sight, turns: Turns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised y [n, N, C] -> (what it sees [n, H, N, D], and the rest as `forward`)."""
        q, k, v = self.attention.queries(y), *self.attention.keys_values(y)
        near, distant = self.turned(k, turns)
        far = None
        if sight.far is not None:
            assert sight.far.index is not None
            far = (_places(distant, sight.far.index), _places(v, sight.far.index))
        mixed = self.mix(q, near, v, far, sight, turns)
        if sight.heads is not None:
            mixed = self._look_as_global(y, mixed, sight, turns)
        return mixed, near, v, distant

    @staticmethod
    def turned(k: Tensor, turns: Turns) -> Pair:
        """Keys [n, G, N, D] -> (keys at their positions, keys as far queries read them)."""
        near = k if turns.near is None else rotate(k, turns.near)
        return near, k if turns.far is not None else near

    def mix(self, q: Tensor, k: Tensor, v: Tensor, far: Pair | None, sight: Sight, turns: Turns) -> Tensor:
        """Unrotated q [n, H, N, D] over k, v [n, G, M, D] and far first tokens [n, G, S, D] -> [n, H, N, D]."""
        near_q = q if turns.near is None else rotate(q, turns.near)
        if sight.far is None or far is None:
            return self.core(near_q, k, v, causal=sight.causal, key_mask=sight.key_mask, mask=sight.program)
        far_q = near_q if turns.far is None else rotate(q, turns.far)
        near = self.core.with_lse(near_q, k, v, causal=sight.causal, key_mask=sight.key_mask, mask=sight.program)
        beyond = self.core.with_lse(far_q, *far, mask=masks.Dense(sight.far.allow[:, None]), distance=sight.far.distance)
        return ops.merge_attention(near, beyond)[0]

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the block: mixed [n, H, N, D] -> x [n, N, C]."""
        x = x + self.attention.out(mixed.transpose(1, 2).flatten(2))
        return x + self.ffn(self.norm2(x))

    def _look_as_global(self, y: Tensor, mixed: Tensor, sight: Sight, turns: Turns) -> Tensor:
        """The rows of global tokens, with projections of their own, in place of what they saw as ordinary ones."""
        own, heads = self.global_attention, sight.heads
        assert own is not None
        assert heads is not None
        if not heads.index.shape[1]:
            return mixed
        at = heads.index[..., None].expand(-1, -1, y.shape[2])
        distance = heads.index[:, :, None] - torch.arange(y.shape[1], device=y.device)
        row, slot = heads.valid.nonzero(as_tuple=True)
        place = heads.index[row, slot]
        q = own.queries(y.gather(1, at))
        if turns.near is None and reads_unprojected(own, self.core, heads.index.shape[1]):
            seen = read_unprojected(own, self.core, q, y, heads.allow, distance)
        else:
            k, v = own.keys_values(y, turns.near)
            if turns.near is not None:
                tables = tuple(t.expand(len(y), -1, -1, -1).gather(2, heads.index[:, None, :, None].expand(-1, 1, -1, t.shape[3]))
                               for t in turns.near)
                q = rotate(q, (tables[0], tables[1]))
            seen = self.core.with_lse(q, k, v, mask=masks.Dense(heads.allow[:, None]), distance=distance)[0]
        return mixed.transpose(1, 2).index_put((row, place), seen.transpose(1, 2)[row, slot].to(mixed.dtype)).transpose(1, 2)


@dataclass
class AttendingCache:
    """What the layers keep of the rows read so far, padding before them.

    layers: keys and values of the last positions; first: of the first tokens by rank, [n, G, S, D] (empty without sinks);
    count [n]: tokens read; next_position [n, L] int64, as in `DecoderCache`.
    """

    layers: list[LayerCache]
    first: list[Pair]
    count: Tensor
    next_position: Tensor

    def rows(self, index: Tensor) -> AttendingCache:
        """The rows `index` [m] int64: kept, repeated or reordered (beam search)."""
        mask = self.layers[0].mask[index] if self.layers else None
        layers = [] if mask is None else [layer.rows(index, mask) for layer in self.layers]
        return AttendingCache(layers, [(k[index], v[index]) for k, v in self.first], self.count[index], self.next_position[index])

    def joined(self, other: AttendingCache) -> AttendingCache:
        """With the rows of another cache of the same model behind its own; both stay as they are."""
        mask = joined_left(self.layers[0].mask, other.layers[0].mask, 1) if self.layers else None
        layers = [] if mask is None else [mine.joined(its, mask) for mine, its in zip(self.layers, other.layers, strict=True)]
        first = [(torch.cat([k, more]), torch.cat([v, other_v])) for (k, v), (more, other_v) in zip(self.first, other.first, strict=True)]
        return AttendingCache(layers, first, torch.cat([self.count, other.count]), torch.cat([self.next_position, other.next_position]))

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.layers for t in (layer.keys, layer.values)] + [t for pair in self.first for t in pair]

    @property
    def bytes(self) -> int:
        """Bytes of keys and values; free places behind them are not counted."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


class AttendingTrunk(Trunk):
    """A stack of attending blocks. `recompute` trades time for memory in backward."""

    def __init__(self, options: TrunkOptions) -> None:
        nn.Module.__init__(self)
        self.options = options
        assert options.attention is None or isinstance(options.attention, TrunkAttentionOptions)
        self.attention = options.attention or TrunkAttentionOptions()
        self.blocks = nn.ModuleList(AttendingBlock(options, self.attention) for _ in range(options.depth))
        self.recompute = False
        self._initialise()
        for block in self.blocks:
            assert isinstance(block, AttendingBlock)
            own = block.global_attention
            for linear in () if own is None else (own.q, own.k, own.v):
                nn.init.normal_(linear.weight, std=options.width**-0.5)

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
        """As `Trunk.forward`; valid positions of a row must stand together."""
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if key_mask is None else key_mask
        if position is None:
            position = torch.arange(x.shape[1], device=x.device)[None]
        sight = sight_of(self.attention, causal, mask, Ranks.of(mask, segment))
        turns, hidden = self._turns(position), {0: x} if 0 in collect else {}
        for layer, block in enumerate(self.blocks[:stop], start=1):
            x = self._through(block, x, sight, turns)[0]
            if layer in collect:
                hidden[layer] = x
        return x, hidden

    def run(
        self, x: Tensor, layout: Layout, cache: AttendingCache | None, keep_cache: bool, collect: Collection[int]
    ) -> tuple[Tensor, Tensor, dict[int, Tensor], AttendingCache | None]:
        """The decoder loop: (x, position [n, N], hidden states by layer, cache if kept or given).

        Raises ValueError for packed rows with a cache, and for a cache of an encoder.
        """
        packed = is_packed(layout, appended=cache is not None, continued=keep_cache)
        if not self.options.causal and (cache is not None or keep_cache):
            raise ValueError("an encoder (causal = false) continues nothing: it has no cache")
        mask, position, segment = layout.mask, layout.position, layout.segment if packed else None
        if cache is not None:
            position = appended_positions(cache.next_position[:, :1], mask)
        back = None
        if _wants_order(mask, at_end=keep_cache or cache is not None):
            order = torch.argsort(mask.to(torch.int8), dim=1, stable=True)  # padding first
            back = torch.argsort(order, dim=1)
            x, mask, placed = _along(x, order), mask.gather(1, order), position.gather(1, order)
            segment = None if segment is None else segment.gather(1, order)
        else:
            placed = position
        grown: AttendingCache | None
        if cache is not None:
            x, hidden, grown = self._append(x, mask, placed, cache, collect)
        else:
            x, hidden, grown = self._read(x, mask, placed, segment, keep_cache, collect)
        if back is not None:
            x, hidden = _along(x, back), {layer: _along(h, back) for layer, h in hidden.items()}
        return x, position, hidden, grown

    def _read(
        self, x: Tensor, mask: Tensor, position: Tensor, segment: Tensor | None, keep: bool, collect: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor], AttendingCache | None]:
        ranks = Ranks.of(mask, segment)
        sight = sight_of(self.attention, self.options.causal, mask, ranks)
        turns, hidden = self._turns(position), {0: x} if 0 in collect else {}
        layers, first = [], []
        count = mask.sum(1)
        for layer, block in enumerate(self.blocks, start=1):
            x, keys, values, distant = self._through(block, x, sight, turns)
            if keep:
                layers.append(self._trimmed(LayerCache(keys, values, mask)))
                if self.attention.sinks:
                    empty = keys.new_zeros(*keys.shape[:2], self.attention.sinks, keys.shape[3])
                    none = torch.zeros_like(count)
                    first.append((_grown_first(empty, distant, none, count), _grown_first(empty, values, none, count)))
            if layer in collect:
                hidden[layer] = x
        if not keep:
            return x, hidden, None
        following = position_after(mask, position)
        return x, hidden, AttendingCache(layers, first, count, following[:, None].expand(-1, len(layers)).contiguous())

    def _append(
        self, x: Tensor, mask: Tensor, position: Tensor, cache: AttendingCache, collect: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor], AttendingCache]:
        fresh, count = mask.sum(1), cache.count + mask.sum(1)
        joined = torch.cat([cache.layers[0].mask, mask], 1)
        order = torch.argsort(joined.to(torch.int8), dim=1, stable=True) if _wants_order(joined, at_end=True) else None
        joined = joined if order is None else joined.gather(1, order)
        length = joined.shape[1]
        rank = torch.where(joined, count[:, None] - length + torch.arange(length, device=x.device), -1)
        slots = torch.arange(self.attention.sinks, device=x.device)
        kept = torch.where(slots < count[:, None], slots, -1)
        sight = sight_of(self.attention, True, joined, Ranks(rank), x.shape[1], kept)
        turns, hidden = self._turns(position), {0: x} if 0 in collect else {}
        layers, first = [], []
        for layer, (block, old) in enumerate(zip(self.blocks, cache.layers, strict=True), start=1):
            assert isinstance(block, AttendingBlock)
            y = block.norm1(x)
            q, k, v = block.attention.queries(y), *block.attention.keys_values(y)
            near, distant = block.turned(k, turns)
            if order is None:
                grown = old.grown(near, v, joined)
            else:
                grown = LayerCache(_places(torch.cat([old.keys, near], 2), order), _places(torch.cat([old.values, v], 2), order), joined)
            if self.attention.sinks:
                keys, values = cache.first[layer - 1]
                first.append((_grown_first(keys, distant, cache.count, fresh), _grown_first(values, v, cache.count, fresh)))
            x = block.finish(x, block.mix(q, grown.keys, grown.values, first[-1] if first else None, sight, turns))
            layers.append(self._trimmed(grown, LEAST_ROOM))
            if layer in collect:
                hidden[layer] = x
        return x, hidden, AttendingCache(layers, first, count, cache.next_position + fresh[:, None])

    def _through(self, block: nn.Module, x: Tensor, sight: Sight, turns: Turns) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, sight, turns, use_reentrant=False)
        return block(x, sight, turns)

    def _turns(self, position: Tensor) -> Turns:
        if self.options.rope_theta is None or not self.attention.rotary:
            return Turns(None, None)
        width, cap = self.options.head_width or self.options.width // self.options.heads, self.attention.distance_cap
        far = None if cap is None else rotary_tables(torch.full_like(position[:1, :1], cap), width, self.options.rope_theta)
        return Turns(rotary_tables(position, width, self.options.rope_theta), far)

    def rotary(self, position: Tensor) -> Rotary | None:
        return self._turns(position).near

    def _trimmed(self, layer: LayerCache, slack: int = 0) -> LayerCache:
        """Without the keys that no later query sees, once there are `slack` of them (a quarter of the window at least)."""
        reach = self.attention.reach
        if self.attention.cache != "rolling" or reach is None:
            return layer
        keep, length = reach - 1, layer.mask.shape[1]
        if length <= keep + (max(slack, reach // 4) if slack else 0):
            return layer
        start = length - keep
        return LayerCache(layer.keys[:, :, start:].clone(), layer.values[:, :, start:].clone(), layer.mask[:, start:])


def _wants_order(mask: Tensor, at_end: bool) -> bool:
    """Whether the valid positions of some row [n, N] do not stand together, or, where asked, not at its end."""
    if at_end:
        return bool((mask[:, :-1] & ~mask[:, 1:]).any())
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return bool((starts.sum(1) > 1).any())


def _grown_first(kept: Tensor, new: Tensor, before: Tensor, fresh: Tensor) -> Tensor:
    """First tokens by rank [n, G, S, D] with those among `new` [n, G, N, D], whose last fresh [n] are of rank before [n]
    and on."""
    slots = torch.arange(kept.shape[2], device=kept.device)
    offset = slots - before[:, None]
    taken = (offset >= 0) & (offset < fresh[:, None])
    if not bool(taken.any()):
        return kept
    index = (new.shape[2] - fresh[:, None] + offset).clamp(0, new.shape[2] - 1)
    return torch.where(taken[:, None, :, None], _places(new, index), kept)


def _along(x: Tensor, index: Tensor) -> Tensor:
    """x [n, N, C] at positions [n, N]"""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _places(x: Tensor, index: Tensor) -> Tensor:
    """x [n, G, N, D] at positions [n, S]"""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
