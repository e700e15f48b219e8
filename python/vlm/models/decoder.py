"""The decoder loop: one pass over the blocks of a trunk for training, prefill and decoding alike.

n rows, S positions, T_l positions cached at layer l, L layers, C width, G key and value heads, D head width.
Sources: pyramiddrop (layers of different length), nvlm (cross blocks between layers).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.layers import Block, Trunk, segment_bias
from vlm.models.attending import AttendingCache, AttendingTrunk
from vlm.models.cache import DecoderCache, LayerCache, appended_positions, is_packed, position_after
from vlm.models.cross import Cross
from vlm.models.far import MemoryCache, read_far, sees_everything
from vlm.models.recurrent import RecurrentCache, RecurrentTrunk
from vlm.types import Layout

Cache = DecoderCache | RecurrentCache | AttendingCache | MemoryCache
"""What is kept of the rows read so far, by the kind of trunk."""


class Reducer(Protocol):
    """Drops positions between layers, in prefill and in training, never in decoding. Made for one pass.

    renumber: positions are counted from 0 again after a drop, otherwise each keeps its own.
    """

    renumber: bool

    def layers(self) -> frozenset[int]:
        """After which layers it drops, counted from 1."""
        ...

    def __call__(
        self,
        layer: int,
        x: Tensor,
        layout: Layout,
        block: Block,
        rotary: tuple[Tensor, Tensor] | None,
        before: tuple[Tensor, Block],
    ) -> Tensor:
        """Positions to keep, [n, K], ascending, -1 padded right. block: the next one; rotary: of layout's positions; before:
        what the block just run has read, [n, S, C], and that block."""
        ...


@dataclass
class DecoderResult:
    """x [n, S', C] before the final norm, with its layout; hidden states by layer (0 is the input), before any drop
    after that layer, with the layouts of those that differ from the last; cache where one was kept."""

    x: Tensor
    layout: Layout
    hidden: dict[int, Tensor] = field(default_factory=dict)
    layouts: dict[int, Layout] = field(default_factory=dict)
    cache: Cache | None = None


def run_decoder(
    trunk: Trunk,
    x: Tensor,
    layout: Layout,
    *,
    cache: Cache | None = None,
    keep_cache: bool = False,
    reducer: Reducer | None = None,
    cross: Cross | None = None,
    collect: Collection[int] = (),
) -> DecoderResult:
    """x [n, S, C] through the blocks, causally; valid positions never attend padding, wherever it stands.

    With `cache` the positions are appended to it: their places follow from it, not from `layout.position`, they see
    every picture of their row, and nothing is dropped. Raises ValueError for packed rows with a cache,
    and for a reducer or pictures beside a trunk that keeps states, which has no keys to drop and none to look at, or
    beside attention to chosen keys, which is given whole rows.
    """
    if isinstance(trunk, RecurrentTrunk):
        assert cache is None or isinstance(cache, RecurrentCache)
        _refuse_pictures_apart("a recurrent mixer", cache, reducer, cross)
        return _result(layout, cache, trunk.run(x, layout, cache, keep_cache, collect))
    if isinstance(trunk, AttendingTrunk):
        assert cache is None or isinstance(cache, AttendingCache)
        _refuse_pictures_apart("attention under a mask", cache, reducer, cross)
        return _result(layout, cache, trunk.run(x, layout, cache, keep_cache, collect))
    if not sees_everything(trunk) or isinstance(cache, MemoryCache):
        assert not isinstance(cache, RecurrentCache | AttendingCache)
        kind = trunk.options.attention.kind if trunk.options.attention is not None else "exact"
        _refuse_pictures_apart(f"attention of kind {kind!r}", cache, reducer, cross)
        return _result(layout, cache, read_far(trunk, x, layout, cache, keep_cache, collect))
    if cache is not None:
        assert isinstance(cache, DecoderCache)
        return _append(trunk, x, layout, cache, collect)
    return _read(trunk, x, layout, keep_cache, reducer, cross, collect)


def _refuse_pictures_apart(what: str, cache: Cache | None, reducer: Reducer | None, cross: Cross | None) -> None:
    if reducer is not None or cross is not None or getattr(cache, "cross", None) is not None:
        raise ValueError(f"{what} works with pictures among the tokens, none of which is dropped between layers")


def _result(layout: Layout, cache: Cache | None, run: tuple[Tensor, Tensor, dict[int, Tensor], Cache | None]) -> DecoderResult:
    """Of a pass that drops nothing; behind a cache the positions are those that the cache gave."""
    x, position, hidden, grown = run
    return DecoderResult(x, layout if cache is None else replace(layout, position=position), hidden, {}, grown)


class _Scene:
    """What the blocks need to know of the positions, computed once for each layout."""

    def __init__(self, trunk: Trunk, x: Tensor, layout: Layout, cross: Cross | None, *, continued: bool) -> None:
        self.layout = layout
        self.packed = is_packed(layout, appended=False, continued=continued)
        # With right padding alone a causal trunk never attends padding from a valid position.
        holes = not self.packed and bool((layout.mask[:, 1:] & ~layout.mask[:, :-1]).any())
        self.key_mask = layout.mask if holes else None
        self.bias = segment_bias(layout.segment, x.dtype) if self.packed else None
        self.rotary = trunk.rotary(layout.position)
        self.sight = None if cross is None else cross.sight(layout, appended=False, dtype=x.dtype)

    def next_position(self) -> Tensor:
        """[n]"""
        return position_after(self.layout.mask, self.layout.position)


def _read(
    trunk: Trunk,
    x: Tensor,
    layout: Layout,
    keep_cache: bool,
    reducer: Reducer | None,
    cross: Cross | None,
    collect: Collection[int],
) -> DecoderResult:
    drops = frozenset() if reducer is None else reducer.layers()
    recompute = trunk.recompute and torch.is_grad_enabled() and not keep_cache
    scene = _Scene(trunk, x, layout, cross, continued=keep_cache)
    if keep_cache:
        cross = None if cross is None else cross.filled()
    result = DecoderResult(x, layout)
    caches, following = [], []
    if 0 in collect:
        result.hidden[0], result.layouts[0] = x, layout
    for layer, block in enumerate(trunk.blocks, start=1):
        assert isinstance(block, Block)
        before = x
        if keep_cache:
            x, keys, values = block.extend(x, None, scene.key_mask, scene.bias, scene.rotary)
            caches.append(LayerCache(keys, values, scene.layout.mask))
            following.append(scene.next_position())
        elif recompute:
            x = checkpoint(block, x, True, scene.key_mask, scene.bias, scene.rotary, use_reentrant=False)
        else:
            x = block(x, True, scene.key_mask, scene.bias, scene.rotary)
        if cross is not None and layer in cross.blocks:
            x = _crossed(cross, layer, x, scene.sight, recompute)
        if layer in collect:
            result.hidden[layer], result.layouts[layer] = x, scene.layout
        if layer in drops and layer < len(trunk.blocks):
            assert reducer is not None
            following_block: Any = trunk.blocks[layer]
            index = reducer(layer, x, scene.layout, following_block, scene.rotary, (before, block))
            if not torch.equal((index >= 0).sum(1), scene.layout.mask.sum(1)):  # else nothing is dropped
                x = _gather(x, index)
                scene = _Scene(trunk, x, scene.layout.gather(index, renumber=reducer.renumber), cross, continued=keep_cache)
    result.x, result.layout = x, scene.layout
    result.layouts = {layer: own for layer, own in result.layouts.items() if own is not scene.layout}
    if keep_cache:
        result.cache = DecoderCache(caches, torch.stack(following, 1), cross)
    return result


def _append(trunk: Trunk, x: Tensor, layout: Layout, cache: DecoderCache, collect: Collection[int]) -> DecoderResult:
    is_packed(layout, appended=True, continued=False)
    cross = cache.cross
    sight = None if cross is None else cross.sight(layout, appended=True, dtype=x.dtype)
    hidden = {0: x} if 0 in collect else {}
    caches: list[LayerCache] = []
    before = mask = key_mask = rotary = None
    position = layout.position
    for layer, (block, kept) in enumerate(zip(trunk.blocks, cache.layers, strict=True), start=1):
        assert isinstance(block, Block)
        if kept.mask is not before:  # layers of one length share mask and positions
            before, mask = kept.mask, torch.cat([kept.mask, layout.mask], dim=1)
            key_mask = None if bool(mask.all()) else mask
            position = appended_positions(cache.next_position[:, layer - 1 : layer], layout.mask)
            rotary = trunk.rotary(position)
        assert mask is not None
        q, keys, values = block.project(x, rotary)
        caches.append(kept.grown(keys, values, mask))
        x = block.attend(x, q, caches[-1].keys, caches[-1].values, key_mask)
        if cross is not None and sight is not None and layer in cross.blocks:
            x = _crossed(cross, layer, x, sight, False)
        if layer in collect:
            hidden[layer] = x
    grown = DecoderCache(caches, cache.next_position + layout.mask.sum(1, keepdim=True), cross)
    return DecoderResult(x, replace(layout, position=position), hidden, {}, grown)


def _crossed(cross: Cross, layer: int, x: Tensor, sight: tuple[Tensor, Tensor] | None, recompute: bool) -> Tensor:
    assert sight is not None
    if recompute:
        return checkpoint(cross, layer, x, *sight, use_reentrant=False)
    return cross(layer, x, *sight)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """x [n, S, C] at index [n, K], 0 where the index is padding; backward scatters to the kept positions alone."""
    taken = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return taken.masked_fill((index < 0)[..., None], 0.0)


__all__ = ["Cache", "DecoderCache", "DecoderResult", "LayerCache", "Reducer", "run_decoder"]
