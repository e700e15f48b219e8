"""What every loader is: endless batches in an exact order, an account of what was read, and a cursor over both."""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Self, TypeVar

from vlm.data.ledger import Quarantine
from vlm.data.mixture import ledger_of, order_of, part_of
from vlm.data.options import DataOptions
from vlm.data.sources.base import Source
from vlm.types.batch import Batch
from vlm.types.communicator import Communicator
from vlm.types.state import Tree

R = TypeVar("R")


class Loader(ABC):
    """Endless batches of this rank's share, with a cursor that a checkpoint holds.

    samples_per_epoch: samples of the source (of all sources of a mixture), or None where rows are what is counted.
    """

    samples_per_epoch: int | None = None

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        *,
        batch_size: int,
        seed: int,
        communicator: Communicator,
        quarantine: str | os.PathLike[str] | None,
    ) -> None:
        self.source, self.batch_size, self.communicator = source, batch_size, communicator
        self._order = order_of(source, seed)
        self._ledger = ledger_of(source, options)
        self._quarantine = Quarantine(quarantine if communicator.rank == 0 else None)
        self._waited = 0.0

    def __iter__(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __next__(self) -> Batch:
        started = time.perf_counter()
        batch = self._next_batch()
        self._waited += time.perf_counter() - started
        return batch

    def classes(self) -> Mapping[str, Sequence[str]]:
        """field -> its distinct values in the training data, sorted, for the field that `data.label` names."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """End the workers, if there are any. The loader cannot be used afterwards; its state can still be read."""

    def state_dict(self) -> Tree:
        """The cursor of the batches handed out: a few numbers, whatever workers have prefetched."""
        return {**self._cursor(), "data": self._order.identity(), "ledger": self._ledger.state_dict()}

    def load_state_dict(self, state: Tree) -> None:
        """Go on after the batches that the state had handed out. Raises DataError when the data changed."""
        self._order.check(state["data"])
        self._ledger.load_state_dict(state["ledger"])
        self._go_to(state)

    def report(self) -> dict[str, Any]:
        """read, bad, reasons, waited (seconds that `next` took in this process), epoch."""
        return {**self._ledger.report(), "waited": self._waited, "epoch": self._reached() // len(self.source)}

    @abstractmethod
    def _next_batch(self) -> Batch: ...

    @abstractmethod
    def _cursor(self) -> Tree:
        """Where the next batch begins, in numbers."""

    @abstractmethod
    def _go_to(self, state: Tree) -> None:
        """Begin the next batch where a cursor says; the ledger is that of the state already."""

    @abstractmethod
    def _reached(self) -> int:
        """The position of the endless order at which the next batch begins."""

    def _count(self, epoch: int, index: int, reason: str) -> None:
        """Note in the ledger that a sample was read; an empty reason means that it is good."""
        self._ledger.count(epoch, reason, lambda: self.source.key(index), part_of(self.source, index))


class RowLoader(Loader, Generic[R]):
    """Batches of packed rows. How many rows there are is not known beforehand: every rank makes them all, and keeps its own."""

    _row = 0

    def _next_batch(self) -> Batch:
        own = []
        for _ in range(self.batch_size):
            row = self._next_row()
            if self._row % self.communicator.size == self.communicator.rank:
                own.append(row)
            self._row += 1
        return self._batch(own)

    @abstractmethod
    def _next_row(self) -> R: ...

    @abstractmethod
    def _batch(self, rows: list[R]) -> Batch: ...
