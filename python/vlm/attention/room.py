"""Storage of keys and values that grows in place. n rows, G key and value heads, P places, D head width."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_ROOM = 32
"""Free places that new storage has at least; otherwise a quarter of what it holds."""


class Room:
    """Storage of one layer, keys and values [n, G, P, D] of which the first `used` places are taken.

    Several caches may see parts of it; only the one that sees all `used` places may take the next, so none changes.
    """

    def __init__(self, keys: Tensor, values: Tensor, used: int) -> None:
        self.keys, self.values, self.used = keys, values, used

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, more: int) -> Room:
        """A copy of keys and values [n, G, T, D] with free places for `more` positions at least."""
        used = keys.shape[2]
        places = used + more + max(LEAST_ROOM, used // 4)
        stored = []
        for old in (keys, values):
            new = old.new_empty(*old.shape[:2], places, old.shape[3])
            new[:, :, :used] = old
            stored.append(new)
        return cls(stored[0], stored[1], used)

    def fits(self, more: int) -> bool:
        """Whether `more` positions can be written in place, here and now."""
        return self.used + more <= self.keys.shape[2] and self.keys.is_inference() == torch.is_inference_mode_enabled()

    def append(self, keys: Tensor, values: Tensor) -> None:
        end = self.used + keys.shape[2]
        self.keys[:, :, self.used : end] = keys
        self.values[:, :, self.used : end] = values
        self.used = end

    @classmethod
    def behind(cls, room: Room | None, old_keys: Tensor, old_values: Tensor, keys: Tensor, values: Tensor) -> Room:
        """Storage that holds the old ones and then the new ones [n, G, N, D]: `room` if the old ones end where it ends."""
        if room is None or room.used != old_keys.shape[2] or not room.fits(keys.shape[2]):
            room = cls.of(old_keys, old_values, keys.shape[2])
        room.append(keys, values)
        return room
