"""What a decoder keeps of the positions that it has read, and how that grows token by token.

n rows, T_l positions cached at layer l, L layers, G key and value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.attention.room import Room
from vlm.models.cross import Cross
from vlm.models.joining import joined_left
from vlm.types import Layout


@dataclass
class LayerCache:
    """What one layer keeps: keys, values [n, G, T_l, D], rotary positions applied; mask [n, T_l], true where a key
    may be attended. room: where keys and values lie, if they may grow in place."""

    keys: Tensor
    values: Tensor
    mask: Tensor
    room: Room | None = None

    def grown(self, keys: Tensor, values: Tensor, mask: Tensor) -> LayerCache:
        """With keys and values [n, G, N, D] behind; mask [n, T_l + N]. This cache stays as it is.

        Without gradients a token costs its own bytes, not a copy of all before it: the storage grows by quarters.
        """
        if torch.is_grad_enabled() or keys.dtype != self.keys.dtype:
            return LayerCache(torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2), mask)
        room = Room.behind(self.room, self.keys, self.values, keys, values)
        return LayerCache(room.keys[:, :, : room.used], room.values[:, :, : room.used], mask, room)

    def rows(self, index: Tensor, mask: Tensor) -> LayerCache:
        """The rows `index` [m] int64, whose mask is `mask`; free places come along, so one copy serves the next token too."""
        room = self.room
        if room is None or room.used != self.keys.shape[2]:
            return LayerCache(self.keys[index], self.values[index], mask)
        own = Room(room.keys[index], room.values[index], room.used)
        return LayerCache(own.keys[:, :, : own.used], own.values[:, :, : own.used], mask, own)

    def joined(self, other: LayerCache, mask: Tensor) -> LayerCache:
        """With the rows of another cache behind; mask: `joined_left` of theirs. Keys end where they end: what is read next
        stands in one place."""
        return LayerCache(joined_left(self.keys, other.keys, 2), joined_left(self.values, other.values, 2), mask)


@dataclass
class DecoderCache:
    """What the layers keep of the rows read so far.

    next_position [n, L] int64: the position that the next token has at each layer. cross: what cross blocks read.
    """

    layers: list[LayerCache]
    next_position: Tensor
    cross: Cross | None = None

    def rows(self, index: Tensor) -> DecoderCache:
        """The rows `index` [m] int64: kept, repeated or reordered (beam search)."""
        masks: dict[int, Tensor] = {}  # layers that share a mask go on sharing it
        layers = []
        for layer in self.layers:
            if id(layer.mask) not in masks:
                masks[id(layer.mask)] = layer.mask[index]
            layers.append(layer.rows(index, masks[id(layer.mask)]))
        return DecoderCache(layers, self.next_position[index], None if self.cross is None else self.cross.rows(index))

    def joined(self, other: DecoderCache) -> DecoderCache:
        """With the rows of another cache of the same model behind its own; both stay as they are."""
        masks: dict[tuple[int, int], Tensor] = {}
        layers = []
        for mine, its in zip(self.layers, other.layers, strict=True):
            pair = id(mine.mask), id(its.mask)
            if pair not in masks:
                masks[pair] = joined_left(mine.mask, its.mask, 1)
            layers.append(mine.joined(its, masks[pair]))
        return DecoderCache(layers, torch.cat([self.next_position, other.next_position]), self._joined_cross(other))

    def _joined_cross(self, other: DecoderCache) -> Cross | None:
        """None on one side: no row of that cache has anything beside it."""
        mine, its = self.cross, other.cross
        if mine is None:
            return None if its is None else its.none_of(len(self.next_position)).joined(its)
        return mine.joined(mine.none_of(len(other.next_position)) if its is None else its)

    def tensors(self) -> list[Tensor]:
        return [t for layer in self.layers for t in (layer.keys, layer.values)]

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values; free places behind them are not counted."""
        return sum(t.numel() * t.element_size() for t in self.tensors())


def is_packed(layout: Layout, *, appended: bool, continued: bool) -> bool:
    """Whether rows hold several documents. Raises ValueError where these would be appended to a cache, or continued by one."""
    packed = bool((layout.segment > 0).any())
    if packed and appended:
        raise ValueError("packed documents cannot be appended to a cache: give each its own row")
    if packed and continued:
        raise ValueError("a row that packs several documents cannot be continued: give each its own row")
    return packed


def appended_positions(next_position: Tensor, mask: Tensor) -> Tensor:
    """[n, S]: positions of new tokens with mask [n, S], of which the first valid one has next_position [n, 1]."""
    return (next_position + mask.cumsum(1) - 1).clamp(min=0)


def position_after(mask: Tensor, position: Tensor) -> Tensor:
    """[n]: the position behind the last valid one of mask, position [n, S]; 0 where there is none."""
    if not position.shape[1]:
        return position.new_zeros(len(position))
    return torch.where(mask, position, -1).amax(1) + 1
