"""The order of samples: endless, shuffled anew in every epoch, and the same whoever reads it.

Each epoch sorts the samples by a keyed hash of their ids. So a sample's place depends on no neighbour: taking bad
samples out leaves the rest in the same order as if they had never been there.
"""

from __future__ import annotations

import numpy as np

from vlm.config.errors import DataError
from vlm.types.random import draw_key, mix
from vlm.types.state import Tree


class EpochOrder:
    """Positions 0, 1, 2, ... of the endless stream to (epoch, index of the sample)."""

    def __init__(self, ids: np.ndarray, seed: int, *, shuffle: bool = True) -> None:
        self.ids = ids
        self.seed = seed
        self.shuffle = shuffle
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, len(self.ids))
        return epoch, int(self._order(epoch)[place]) if self.shuffle else place

    def _order(self, epoch: int) -> np.ndarray:
        order = self._orders.get(epoch)
        if order is None:
            order = np.argsort(mix(self.ids, draw_key(self.seed, "order", epoch)), kind="stable")
            self._orders = {e: o for e, o in self._orders.items() if e >= epoch - 1}
            self._orders[epoch] = order
        return order

    def identity(self) -> Tree:
        """What a saved cursor is good for: the same samples and the same seed."""
        mixed = mix(self.ids, 0)
        return {
            "samples": len(self.ids),
            "fingerprint": int(np.bitwise_xor.reduce(mixed) >> 1),
            "seed": self.seed,
        }

    def check(self, saved: Tree) -> None:
        """Raises DataError when a saved cursor belongs to other data or another seed."""
        mine = self.identity()
        if saved["seed"] != mine["seed"]:
            raise DataError(
                f"the checkpoint's data order has seed {saved['seed']}, this run has seed {mine['seed']}",
                remedy="resume with the seed of the checkpoint",
            )
        if (saved["samples"], saved["fingerprint"]) != (mine["samples"], mine["fingerprint"]):
            raise DataError(
                f"the data changed since the checkpoint: it had {saved['samples']} samples, "
                f"now there are {mine['samples']}"
                + (" others" if saved["samples"] == mine["samples"] else ""),
                remedy="resume with the data of the checkpoint, or start a new run from its weights",
            )
