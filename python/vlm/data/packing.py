"""Text alone: documents to rows of a language model, with a cursor that says (document, token).

Every rank tokenises every document, so that rows do not depend on the number of ranks; it keeps its own rows.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from vlm.config.errors import DataError
from vlm.data.captions import text_values
from vlm.data.ledger import Ledger, Quarantine
from vlm.data.mixture import ledger_of, order_of, part_of, parts_of
from vlm.data.options import ConcatPacker, DataOptions, DocumentPacker
from vlm.data.order import EpochOrder
from vlm.data.samples import BadSample, clean_text, stable_id
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.pictures import BadPicture
from vlm.types.batch import Batch, TokenIds
from vlm.types.communicator import Communicator
from vlm.types.state import Tree

_READ_AHEAD = 64


@dataclass
class PackedRow:
    """One row: pieces of documents. starts: where each piece begins in the row."""

    key: str
    draw: int
    epoch: int
    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    text: str = ""


class Documents:
    """Token ids of documents by position in the endless order; bad ones are None. Reads some ahead."""

    def __init__(self, source: Source, order: EpochOrder, options: DataOptions, tokenizer: Tokenizer) -> None:
        self.source, self.order, self.options, self.tokenizer = source, order, options, tokenizer
        self._columns = [part.columns.text for _, part in parts_of(source, options)]
        self.reader = open_reader(source.spec(), options.limits)
        self._ready: dict[int, tuple[list[int] | None, str, str, str]] = {}

    def at(self, position: int, until: int | None = None) -> tuple[list[int] | None, str, str, str]:
        """(ids with bos and eos, text, reason, detail) of the document at a position."""
        if position not in self._ready:
            stop = position + _READ_AHEAD if until is None else min(position + _READ_AHEAD, until)
            self._ready = {}
            good: list[tuple[int, str]] = []
            for p in range(position, stop):
                try:
                    index = self.order.at(p)[1]
                    fields = self.reader.fields(self.source.recipe(index))
                    value = text_values(fields, self._columns[part_of(self.source, index)])[0]
                    good.append((p, clean_text(value, self.options.max_text)))
                except (BadSample, BadPicture) as error:
                    self._ready[p] = (None, "", error.reason, error.detail)
            eos = self.tokenizer.eos_id
            for (p, text), ids in zip(good, self.tokenizer.ids([text for _, text in good])):
                if eos is not None and (not ids or ids[-1] != eos):
                    ids = [*ids, eos]
                self._ready[p] = (ids, text, "", "")
        return self._ready[position]


def pack_batch(rows: list[PackedRow], length: int, pad_id: int) -> Batch:
    """Rows as the stream `text`: ids [n, length] with mask, segment (-1 at padding) and position within the piece."""
    n = len(rows)
    ids = np.full((n, length), pad_id, np.int64)
    mask = np.zeros((n, length), bool)
    segment = np.full((n, length), -1, np.int64)
    position = np.zeros((n, length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = row.ids
        mask[i, : len(row.ids)] = True
        for number, (start, stop) in enumerate(zip(row.starts, [*row.starts[1:], len(row.ids)])):
            segment[i, start:stop] = number
            position[i, start:stop] = np.arange(stop - start)
    stream = TokenIds(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.arange(n),
        segment=torch.from_numpy(segment),
        position=torch.from_numpy(position),
    )
    return Batch(
        streams={"text": stream},
        keys=[row.key for row in rows],
        draws=torch.tensor([row.draw for row in rows], dtype=torch.int64),
        epoch=torch.tensor([row.epoch for row in rows], dtype=torch.int64),
    )


class PackedLoader:
    """Endless batches of packed rows."""

    def __init__(
        self,
        source: Source,
        options: DataOptions,
        *,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int,
        communicator: Communicator,
        quarantine: str | os.PathLike[str] | None,
    ) -> None:
        assert options.packer is not None
        self.packer: DocumentPacker | ConcatPacker = options.packer
        self.source, self.tokenizer, self.batch_size = source, tokenizer, batch_size
        self.communicator = communicator
        self._order = order_of(source, seed)
        self._documents = Documents(source, self._order, options, tokenizer)
        self._ledger = ledger_of(source, options)
        self._quarantine = Quarantine(quarantine if communicator.rank == 0 else None)
        self.samples_per_epoch: int | None = (
            None  # rows are counted, and how many there are is not known beforehand
        )
        self._document = 0  # position of the document that the next row begins in
        self._offset = 0  # token of that document that the next row begins with
        self._row = 0
        self._waited = 0.0

    def __iter__(self) -> PackedLoader:
        return self

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def classes(self) -> Mapping[str, Sequence[str]]:
        return {}

    def close(self) -> None:
        """Nothing runs beside the trainer here."""

    def __next__(self) -> Batch:
        started = time.perf_counter()
        rows = []
        for _ in range(self.batch_size):
            row = self._next_row()
            if self._row % self.communicator.size == self.communicator.rank:
                rows.append(row)
            self._row += 1
        batch = pack_batch(rows, self.packer.length, self.tokenizer.pad_id)
        self._waited += time.perf_counter() - started
        return batch

    def _next_row(self) -> PackedRow:
        row: PackedRow | None = None
        while row is None or (self.packer.kind == "concat" and len(row.ids) < self.packer.length):
            ids, _, reason, detail = self._documents.at(self._document)
            epoch, index = self._order.at(self._document)
            if self._offset == 0:
                if reason:
                    self._quarantine.add(self.source.key(index), reason, detail)
                part = part_of(self.source, index)
                self._ledger.count(epoch, reason, lambda index=index: self.source.key(index), part)  # type: ignore[misc]
            if ids is None:
                self._document += 1
                continue
            if row is None:
                draw = stable_id(str(int(self.source.ids[index])), str(self._offset))
                row = PackedRow(self.source.key(index), draw, epoch)
            self._offset = append_piece(row, ids, self._offset, self.packer)
            if self._offset == 0:
                self._document += 1
        return row

    def state_dict(self) -> Tree:
        return {
            "document": self._document,
            "offset": self._offset,
            "row": self._row,
            "data": self._order.identity(),
            "ledger": self._ledger.state_dict(),
        }

    def load_state_dict(self, state: Tree) -> None:
        self._order.check(state["data"])
        self._ledger.load_state_dict(state["ledger"])
        self._document, self._offset, self._row = (int(state[name]) for name in ("document", "offset", "row"))

    def report(self) -> dict[str, Any]:
        epoch = self._document // len(self.source)
        return {**self._ledger.report(), "waited": self._waited, "epoch": epoch}


def append_piece(row: PackedRow, ids: list[int], offset: int, packer: DocumentPacker | ConcatPacker) -> int:
    """Put what fits of a document, from `offset` on, at the end of a row. The next offset, 0 when all is placed.

    A document that goes on in a row of its own repeats one token there as context, so that each of its tokens but
    the first is predicted exactly once.
    """
    room = packer.length - len(row.ids)
    row.starts.append(len(row.ids))
    row.ids += ids[offset : offset + room]
    after = offset + room
    if after >= len(ids):
        return 0
    return after - 1 if packer.kind == "document" else after


def document_rows(
    source: Source, options: DataOptions, tokenizer: Tokenizer, length: int, ledger: Ledger
) -> Iterator[tuple[PackedRow, str]]:
    """(row, text of the document) once through a source in its own order; the text only with the first row of each."""
    order = EpochOrder(source.ids, 0, shuffle=False)
    documents = Documents(source, order, options, tokenizer)
    packer = DocumentPacker(length=length)
    for position in range(len(source)):
        ids, text, reason, _ = documents.at(position, len(source))
        ledger.count(0, reason, lambda position=position: source.key(position))  # type: ignore[misc]
        if ids is None:
            continue
        offset, first = 0, True
        while first or offset:
            row = PackedRow(source.key(position), stable_id(str(int(source.ids[position])), str(offset)), 0)
            offset = append_piece(row, ids, offset, packer)
            yield row, text if first else ""
            first = False
    if not ledger.epoch_good:
        raise DataError(f"none of the {len(source)} documents can be used", remedy="see `vlm data check`")
