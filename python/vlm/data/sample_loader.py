"""Batches of samples, from any number of workers and ranks.

Every rank walks the same endless stream of candidates. A rank decodes the candidates whose position is its own
modulo the number of ranks, the ranks tell each other which ones are bad, and the first `batch_size` good ones are
the global batch, of which a rank holds its own. So the union over ranks is the same at any world size, and a run
over data with bad samples equals a run over the data without them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vlm.config.errors import DataError
from vlm.data.collate import Row
from vlm.data.decode import Decoded
from vlm.data.endless import Loader
from vlm.data.options import DataOptions
from vlm.data.plan import Plan, Reads
from vlm.data.pool import open_decoder
from vlm.data.samples import REASON_CODES, REASON_OF_CODE
from vlm.data.sources.base import Source
from vlm.data.texts import field_values
from vlm.types.batch import Batch
from vlm.types.communicator import Communicator
from vlm.types.state import Tree


class SampleLoader(Loader):
    """Batches of pictures, texts or both."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        reads: Reads,
        *,
        batch_size: int,
        seed: int,
        communicator: Communicator,
        train: bool,
        quarantine: str | os.PathLike[str] | None,
        classes: Sequence[str] | None,
    ) -> None:
        super().__init__(
            source, options, batch_size=batch_size, seed=seed, communicator=communicator, quarantine=quarantine
        )
        self.options = options
        self.samples_per_epoch = len(source)
        if classes is None:
            classes = field_values(source, options, options.label) if options.label else []
        self._classes = list(classes)
        if options.label and not self._classes:
            raise DataError(f"no sample has the field {options.label!r}", where="data.label")
        self._plan = Plan(source, options, reads, seed=seed, train=train, classes=self._classes)
        self._ahead = options.prefetch * batch_size if options.workers else 0
        self._decoder = open_decoder(self._plan.spec, options.workers)
        self._position = 0  # candidates consumed by the batches handed out
        self._submitted = 0

    def classes(self) -> Mapping[str, Sequence[str]]:
        return {self.options.label: self._classes} if self.options.label else {}

    def close(self) -> None:
        self._decoder.close()

    def _next_batch(self) -> Batch:
        rank, size = self.communicator.rank, self.communicator.size
        rows: list[Row] = []
        chosen, position = 0, self._position
        while chosen < self.batch_size:
            window = range(position, position + self.batch_size - chosen)
            self._submit(window.stop + self._ahead)
            done = {p: self._plan.finish(self._decoder.take(p)) for p in window if p % size == rank}
            mine = {p: decoded for p, (decoded, _) in done.items()}
            for p, reason in zip(window, self._reasons(window, mine)):
                epoch, index = self._order.at(p)
                self._count(epoch, index, reason)
                if reason:
                    continue
                chosen += 1
                if p in mine:
                    rows.append(self._plan.row(index, epoch, *done[p]))
            position = window.stop
        self._position = position
        return self._plan.batch(rows)

    def _submit(self, until: int) -> None:
        """Hand this rank's candidates before `until` to the decoder."""
        rank, size = self.communicator.rank, self.communicator.size
        jobs = []
        for p in range(self._submitted, until):
            if p % size == rank:
                epoch, index = self._order.at(p)
                jobs.append((p, self._plan.job(index, epoch)))
        if jobs:
            self._decoder.submit(jobs)
        self._submitted = max(self._submitted, until)

    def _reasons(self, window: range, mine: dict[int, Decoded]) -> list[str]:
        """Why each candidate of the window is bad, as all ranks know it; empty for a good one."""
        size = self.communicator.size
        reasons = [mine[p].reason for p in window] if size == 1 else self._told(window, mine)
        for p, reason in zip(window, reasons):
            if reason:
                detail = mine[p].detail if p in mine else ""
                self._quarantine.add(self.source.key(self._order.at(p)[1]), reason, detail)
        return reasons

    def _told(self, window: range, mine: dict[int, Decoded]) -> list[str]:
        size = self.communicator.size
        share = -(-len(window) // size)
        codes = [REASON_CODES[r.reason] if r.reason else 0 for r in mine.values()]
        told = self.communicator.gather_numbers(codes + [0] * (share - len(codes)))
        taken = [iter(codes) for codes in told]
        return [REASON_OF_CODE.get(next(taken[p % size]), "") for p in window]

    def _cursor(self) -> Tree:
        return {"position": self._position}

    def _go_to(self, state: Tree) -> None:
        self._position = self._submitted = int(state["position"])
        self._decoder.forget()

    def _reached(self) -> int:
        return self._position
