"""The loader: endless batches in an exact order, from any number of workers and ranks.

Every rank walks the same endless stream of candidates. A rank decodes the candidates whose position is its own
modulo the number of ranks, the ranks tell each other which ones are bad, and the first `batch_size` good ones are
the global batch, of which a rank holds its own. So the union over ranks is the same at any world size, and a run
over data with bad samples equals a run over the data without them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from vlm.config.errors import DataError
from vlm.data.collate import Row
from vlm.data.decode import Decoded
from vlm.data.ledger import Quarantine
from vlm.data.mixture import Mixture, ledger_of, open_filtered, order_of, part_of
from vlm.data.options import DataOptions
from vlm.data.plan import Plan, Preprocesses, Reads
from vlm.data.pool import open_decoder
from vlm.data.samples import REASON_CODES, REASON_OF_CODE
from vlm.data.sources.base import Source
from vlm.data.texts import field_values
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.chat import Template
from vlm.runtime.tiling import Tiling
from vlm.types.batch import Batch
from vlm.types.communicator import Communicator, SingleProcess
from vlm.types.state import Tree


class Loader(Protocol):
    """Endless batches of this rank's share, with a cursor that a checkpoint holds.

    samples_per_epoch: samples of the source (of all sources of a mixture), or None where rows are what is counted.
    """

    samples_per_epoch: int | None

    def classes(self) -> Mapping[str, Sequence[str]]:
        """field -> its distinct values in the training data, sorted, for the field that `data.label` names."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def __enter__(self) -> Loader: ...

    def __exit__(self, *error: object) -> None: ...

    def state_dict(self) -> Tree:
        """The cursor of the batches handed out: a few numbers, whatever workers have prefetched."""
        ...

    def load_state_dict(self, state: Tree) -> None:
        """Go on after the batches that the state had handed out. Raises DataError when the data changed."""
        ...

    def report(self) -> dict[str, Any]:
        """read, bad, reasons, waited (seconds that `next` took in this process), epoch."""
        ...

    def close(self) -> None: ...


def build_loader(
    options: DataOptions,
    *,
    tokenizer: Tokenizer | None = None,
    preprocess: Preprocesses = None,
    batch_size: int,
    seed: int = 0,
    communicator: Communicator | None = None,
    split: str = "train",
    source: Source | None = None,
    quarantine: str | os.PathLike[str] | None = None,
    classes: Sequence[str] | None = None,
    picture_positions: int | None = None,
    template: Template | None = None,
    tiling: Tiling | None = None,
    tiles_apart: bool = False,
    frames: int | None = None,
) -> Loader:
    """The loader of a `[data]` table: next(loader) is this rank's share of the next global batch.

    batch_size: samples (rows of a packer) of a global batch. preprocess: None for text alone; tokenizer: None for
    pictures alone. split: `train`, or `val` (no augmentation). source: already open, instead of the table's address.
    quarantine: directory for `quarantine.jsonl`, which rank 0 writes. classes: of `data.label`, where they are known
    (those of the training data for `val`); else they are collected from the source.
    preprocess: one, or one for each picture stream (`image`, `image.NAME`). picture_positions: positions that a picture
    takes in a row once it is expanded (1 unless said): what a row's length counts. template: how messages are written,
    where `data.text.template` does not say; else plain. tiling: how a picture becomes several rows, each of which takes
    `picture_positions` beside the text that announces it; None: it is one row. tiles_apart: tiles and that text take none,
    thumbnails alone do. frames: most pictures of a sample, for a model that reads them as a clip; None: it reads one.
    Raises DataError (exit code 3) when data are missing, and from next() when the budget of bad samples is spent.
    """
    if batch_size < 1:
        raise DataError(f"batch_size is {batch_size}, expected at least 1")
    communicator = communicator if communicator is not None else SingleProcess()
    source = source if source is not None else open_split(options, split)
    reads = Reads.of(tokenizer, preprocess, picture_positions, template, tiling, tiles_apart, frames)
    talks = [*options.conversations, *(name for part in options.mixture for name in options.of_part(part).conversations)]
    if options.packer is not None and talks:
        from vlm.data.packing_conversations import PackedConversations

        return PackedConversations(
            source,
            options,
            reads,
            batch_size=batch_size,
            seed=seed,
            communicator=communicator,
            train=split == "train",
            quarantine=quarantine,
            classes=classes,
        )
    if options.packer is not None:
        from vlm.data.packing import PackedLoader

        if tokenizer is None or preprocess is not None:
            raise DataError(
                "data.packer is for text-only models", remedy="leave data.packer out for pictures and text"
            )
        return PackedLoader(
            source,
            options,
            tokenizer=tokenizer,
            batch_size=batch_size,
            seed=seed,
            communicator=communicator,
            quarantine=quarantine,
        )
    return SampleLoader(
        source,
        options,
        reads,
        batch_size=batch_size,
        seed=seed,
        communicator=communicator,
        train=split == "train",
        quarantine=quarantine,
        classes=classes,
    )


def open_split(options: DataOptions, split: str) -> Source:
    """The source of `train` (a mixture where the table has one) or `val`, filtered by `where`.

    Raises DataError when the table names no `val`.
    """
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, expected train or val")
    if split == "train" and options.mixture:
        return Mixture(options)
    uri = options.source if split == "train" else options.val
    if uri is None:
        raise DataError("no evaluation data", where="data.val", remedy="set data.val (or pass --val URI)")
    return open_filtered(uri, options)


class SampleLoader:
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
        self.source, self.options = source, options
        self.batch_size, self.communicator = batch_size, communicator
        self._order = order_of(source, seed)
        self._ledger = ledger_of(source, options)
        self._quarantine = Quarantine(quarantine if communicator.rank == 0 else None)
        self.samples_per_epoch: int | None = len(source)
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
        self._waited = 0.0

    def __iter__(self) -> SampleLoader:
        return self

    def __enter__(self) -> SampleLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def classes(self) -> Mapping[str, Sequence[str]]:
        return {self.options.label: self._classes} if self.options.label else {}

    def close(self) -> None:
        """End the workers. The loader cannot be used afterwards; its state can still be read."""
        self._decoder.close()

    def __next__(self) -> Batch:
        started = time.perf_counter()
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
                part = part_of(self.source, index)
                self._ledger.count(epoch, reason, lambda index=index: self.source.key(index), part)  # type: ignore[misc]
                if reason:
                    continue
                chosen += 1
                if p in mine:
                    rows.append(self._plan.row(index, epoch, *done[p]))
            position = window.stop
        self._position = position
        batch = self._plan.batch(rows)
        self._waited += time.perf_counter() - started
        return batch

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

    def state_dict(self) -> Tree:
        return {
            "position": self._position,
            "data": self._order.identity(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Tree) -> None:
        self._order.check(state["data"])
        self._ledger.load_state_dict(state["ledger"])
        self._position = self._submitted = int(state["position"])
        self._decoder.forget()

    def report(self) -> dict[str, Any]:
        epoch = self._position // len(self.source)
        return {**self._ledger.report(), "waited": self._waited, "epoch": epoch}
