"""Text alone: documents to rows of a language model, with a cursor that says (document, token).

Every rank tokenises every document, so that rows do not depend on the number of ranks; it keeps its own rows.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from vlm.config.errors import DataError
from vlm.data.captions import text_values
from vlm.data.endless import RowLoader
from vlm.data.mixture import part_of, parts_of
from vlm.data.options import ConcatPacker, DataOptions, DocumentPacker
from vlm.data.order import EpochOrder
from vlm.data.samples import BadSample, clean_text, stable_id
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.data.streams.numbers import PLAIN, Marked, Weights
from vlm.data.tokenizer import Tokenizer
from vlm.runtime.pictures import BadPicture
from vlm.types.batch import Batch, Features, Stream, TokenIds
from vlm.types.communicator import Communicator
from vlm.types.state import Tree

_READ_AHEAD = 64


@dataclass
class PackedRow:
    """One row: pieces of documents. starts: where each piece begins in the row. weights: stream of token weights -> one a token."""

    key: str
    draw: int
    epoch: int
    ids: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    text: str = ""
    weights: dict[str, list[float]] = field(default_factory=dict)


class Document(NamedTuple):
    """ids with bos and eos, None for a bad one; weights: stream of token weights -> one a token; why it is bad."""

    ids: list[int] | None
    weights: dict[str, list[float]]
    reason: str = ""
    detail: str = ""


class Documents:
    """Token ids of documents by position in the endless order; bad ones are None. Reads some ahead."""

    def __init__(self, source: Source, order: EpochOrder, options: DataOptions, tokenizer: Tokenizer) -> None:
        self.source, self.order, self.options, self.tokenizer = source, order, options, tokenizer
        tables = [part for _, part in parts_of(source, options)]
        self._columns = [part.columns.text for part in tables]
        self._weights = [Weights(part.weights, part.column_names) for part in tables]
        self.weights = list(dict.fromkeys(name for part in tables for name in part.weights))
        self.reader = open_reader(source.spec(), options.limits)
        self._ready: dict[int, Document] = {}

    def at(self, position: int, until: int | None = None) -> Document:
        """The document at a position."""
        if position not in self._ready:
            stop = position + _READ_AHEAD if until is None else min(position + _READ_AHEAD, until)
            self._ready = {}
            good: list[tuple[int, str, dict[str, Marked]]] = []
            for p in range(position, stop):
                try:
                    index = self.order.at(p)[1]
                    fields = self.reader.fields(self.source.recipe(index))
                    part = part_of(self.source, index)
                    text = clean_text(text_values(fields, self._columns[part])[0], self.options.max_text)
                    maker = self._weights[part]
                    good.append((p, text, {name: maker.make(name, fields, [text], [fields])[0] for name in maker.streams}))
                except (BadSample, BadPicture) as error:
                    self._ready[p] = Document(None, {}, error.reason, error.detail)
            texts = [text for _, text, _ in good]
            if self.weights:
                for (p, _, marks), located in zip(good, self.tokenizer.located(texts)):
                    ids = self._ended([i for i, _, _ in located])
                    places = [(start, stop) for _, start, stop in located]
                    self._ready[p] = Document(ids, self._weighed(places, len(ids), marks))
            else:
                for (p, _, _), ids in zip(good, self.tokenizer.ids(texts)):
                    self._ready[p] = Document(self._ended(ids), {})
        return self._ready[position]

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self.tokenizer.eos_id
        return ids if eos is None or ids[-1:] == [eos] else [*ids, eos]

    def _weighed(self, places: list[tuple[int, int]], count: int, marks: dict[str, Marked]) -> dict[str, list[float]]:
        """The weights of each stream, one for each of `count` tokens. places: characters from, to of those in the text."""
        weights = {}
        for name in self.weights:
            mark = marks.get(name, PLAIN)
            weights[name] = [mark.at(start, stop) for start, stop in places] + [mark.end] * (count - len(places))
            if self.tokenizer.eos_id is not None:
                weights[name][-1] = mark.end
        return weights


def pack_batch(rows: list[PackedRow], length: int, pad_id: int) -> Batch:
    """Rows as the stream `text`: ids [n, length] with mask, segment (-1 at padding) and position within the piece; and a stream
    [n, length] of each of their token weights."""
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
    text = TokenIds(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.arange(n),
        segment=torch.from_numpy(segment),
        position=torch.from_numpy(position),
    )
    streams: dict[str, Stream] = {"text": text}
    for name in rows[0].weights if rows else ():
        values = np.zeros((n, length), np.float32)
        for i, row in enumerate(rows):
            values[i, : len(row.ids)] = row.weights[name]
        streams[name] = Features(torch.from_numpy(values), text.mask, text.sample_index)
    return Batch(
        streams=streams,
        keys=[row.key for row in rows],
        draws=torch.tensor([row.draw for row in rows], dtype=torch.int64),
        epoch=torch.tensor([row.epoch for row in rows], dtype=torch.int64),
    )


class PackedLoader(RowLoader[PackedRow]):
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
        refuse_numbers(options)
        super().__init__(
            source, options, batch_size=batch_size, seed=seed, communicator=communicator, quarantine=quarantine
        )
        self.packer: DocumentPacker | ConcatPacker = options.packer
        self.tokenizer = tokenizer
        self._documents = Documents(source, self._order, options, tokenizer)
        self._document = 0  # position of the document that the next row begins in
        self._offset = 0  # token of that document that the next row begins with

    def close(self) -> None:
        """Nothing runs beside the trainer here."""

    def _next_row(self) -> PackedRow:
        row: PackedRow | None = None
        while row is None or (self.packer.kind == "concat" and len(row.ids) < self.packer.length):
            document = self._documents.at(self._document)
            epoch, index = self._order.at(self._document)
            if self._offset == 0:
                if document.reason:
                    self._quarantine.add(self.source.key(index), document.reason, document.detail)
                self._count(epoch, index, document.reason)
            if document.ids is None:
                self._document += 1
                continue
            if row is None:
                draw = stable_id(str(int(self.source.ids[index])), str(self._offset))
                row = PackedRow(self.source.key(index), draw, epoch)
            self._offset = append_piece(row, document.ids, self._offset, self.packer, document.weights)
            if self._offset == 0:
                self._document += 1
        return row

    def _batch(self, rows: list[PackedRow]) -> Batch:
        return pack_batch(rows, self.packer.length, self.tokenizer.pad_id)

    def _cursor(self) -> Tree:
        return {"document": self._document, "offset": self._offset, "row": self._row}

    def _go_to(self, state: Tree) -> None:
        self._document, self._offset, self._row = (int(state[name]) for name in ("document", "offset", "row"))

    def _reached(self) -> int:
        return self._document


def refuse_numbers(options: DataOptions) -> None:
    """Raises DataError for streams of numbers: a packed row has none of its own."""
    for name in [*options.numbers, *(name for part in options.mixture for name in options.of_part(part).numbers)]:
        raise DataError(
            "a packed row holds several samples and has no number of its own",
            where=f"data.streams.{name}",
            remedy='weigh its tokens: kind = "token-weights" with column',
        )


def append_piece(
    row: PackedRow,
    ids: list[int],
    offset: int,
    packer: DocumentPacker | ConcatPacker,
    weights: Mapping[str, list[float]] | None = None,
) -> int:
    """Put what fits of a document, from `offset` on, at the end of a row. The next offset, 0 when all is placed.

    A document that goes on in a row of its own repeats one token there as context, so that each of its tokens but
    the first is predicted exactly once.
    """
    room = packer.length - len(row.ids)
    row.starts.append(len(row.ids))
    row.ids += ids[offset : offset + room]
    for name, own in (weights or {}).items():
        row.weights.setdefault(name, []).extend(own[offset : offset + room])
    after = offset + room
    if after >= len(ids):
        return 0
    return after - 1 if packer.kind == "document" else after
