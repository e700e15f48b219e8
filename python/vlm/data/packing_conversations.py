"""Conversations packed into rows: whole samples one after another while they fit, pictures counted at their full width.

Every rank decodes every sample, so that rows do not depend on the number of ranks; it keeps its own rows.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from vlm.config.errors import DataError
from vlm.data.collate import Row, picture_stream
from vlm.data.endless import RowLoader
from vlm.data.options import DataOptions
from vlm.data.packing import refuse_numbers
from vlm.data.plan import Plan, Reads
from vlm.data.pool import open_decoder
from vlm.data.samples import stable_id
from vlm.data.sources.base import Source
from vlm.data.streams.encode import EncodedRow, conversation_stream, weight_stream
from vlm.types.batch import Batch, Stream
from vlm.types.communicator import Communicator
from vlm.types.state import Tree

_AHEAD = 32


@dataclass
class PackedSamples:
    """Samples that share a row, and the positions that they take."""

    rows: list[Row] = field(default_factory=list)
    positions: int = 0

    @property
    def key(self) -> str:
        """The first sample's key and how many more there are."""
        return self.rows[0].key + (f" +{len(self.rows) - 1}" if len(self.rows) > 1 else "")

    @property
    def joined(self) -> EncodedRow:
        parts = [row.encoded["text"] for row in self.rows]
        names = dict.fromkeys(name for part in parts for name in part.weights)
        return EncodedRow(
            [i for part in parts for i in part.ids],
            [i for part in parts for i in part.role],
            [i for part in parts for i in part.supervised],
            sum(part.pictures for part in parts),
            self.positions,
            {name: [w for part in parts for w in part.weights.get(name, map(float, part.supervised))] for name in names},
        )


class PackedConversations(RowLoader[PackedSamples]):
    """Endless batches of packed rows of the stream `text`, with the pictures of each row numbered by `slot`."""

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
        classes: Sequence[str] | None = None,
    ) -> None:
        """Raises DataError where packing has no meaning: other streams than one conversation `text`."""
        assert options.packer is not None
        if reads.tokenizer is None:
            raise DataError("data.packer needs a tokenizer")
        if options.group_by is not None or options.label is not None:
            raise DataError("a packed row has no group and no label", where="data.packer", remedy="leave data.packer out")
        refuse_numbers(options)
        self._plan = Plan(source, options, reads, seed=seed, train=train, classes=classes or ())
        if list(self._plan.conversations) != ["text"]:
            raise DataError(
                f"the packer packs the conversation stream text alone, found {', '.join(self._plan.conversations)}",
                where="data.packer",
                remedy="leave data.packer out",
            )
        super().__init__(
            source, options, batch_size=batch_size, seed=seed, communicator=communicator, quarantine=quarantine
        )
        self.length, self.pad_id = options.packer.length, reads.tokenizer.pad_id
        self._decoder = open_decoder(self._plan.spec, options.workers)
        self._ahead = _AHEAD if options.workers else 1
        self._sample = 0  # position of the sample that the next row begins with
        self._submitted = 0
        self._waiting: Row | None = None  # the sample at `_sample`, if it was read already and did not fit

    def close(self) -> None:
        self._decoder.close()

    def _next_row(self) -> PackedSamples:
        """The next samples that fit together. `_sample` is left at the first that does not."""
        packed = PackedSamples()
        while True:
            row = self._waiting if self._waiting is not None else self._read(self._sample)
            self._waiting = None
            if row is not None:
                own = row.encoded["text"].positions
                if packed.rows and packed.positions + own > self.length:
                    self._waiting = row
                    return packed
                packed.rows.append(row)
                packed.positions += own
            self._sample += 1

    def _read(self, position: int) -> Row | None:
        """The sample at a position of the endless order, or None for a bad one, which is counted and named."""
        if position >= self._submitted:
            jobs = []
            for p in range(position, position + self._ahead):
                epoch, index = self._order.at(p)
                jobs.append((p, self._plan.job(index, epoch)))
            self._decoder.submit(jobs)
            self._submitted = position + self._ahead
        epoch, index = self._order.at(position)
        decoded, encoded = self._plan.finish(self._decoder.take(position))
        if decoded.reason:
            self._quarantine.add(self.source.key(index), decoded.reason, decoded.detail)
        self._count(epoch, index, decoded.reason)
        return None if decoded.reason else self._plan.row(index, epoch, decoded, encoded)

    def _batch(self, rows: list[PackedSamples]) -> Batch:
        joined = [(i, row.joined) for i, row in enumerate(rows)]
        text = conversation_stream(joined, self.pad_id)
        segment = np.full(text.values.shape, -1, np.int64)
        position = np.zeros(text.values.shape, np.int64)
        for i, row in enumerate(rows):
            at = 0
            for number, sample in enumerate(row.rows):
                k = len(sample.encoded["text"].ids)
                segment[i, at : at + k] = number
                position[i, at : at + k] = np.arange(k)
                at += k
        streams: dict[str, Stream] = {}
        for name, (size, floating) in self._plan.shape.pictures.items():
            empty = np.zeros((0, 3, size, size), np.float32 if floating else np.uint8)
            parts = [np.concatenate([empty, *(s.decoded.pixels[name] for s in row.rows)]) for row in rows]
            places = [_counted_through(row) for row in rows] if self._plan.shape.tiled else None
            streams[name] = picture_stream(parts, size, floating, True, places)
        streams |= {name: weight_stream(name, joined, text) for name in self._plan.weights}
        streams["text"] = replace(text, segment=torch.from_numpy(segment), position=torch.from_numpy(position))
        draws = [stable_id(*(str(row.draw) for row in samples.rows)) for samples in rows]
        return Batch(
            streams=streams,
            keys=[row.key for row in rows],
            draws=torch.tensor(draws, dtype=torch.int64),
            epoch=torch.tensor([row.rows[0].epoch for row in rows], dtype=torch.int64),
        )

    def _cursor(self) -> Tree:
        return {"sample": self._sample, "waiting": self._waiting is not None, "row": self._row}

    def _go_to(self, state: Tree) -> None:
        self._decoder.forget()
        self._sample = self._submitted = int(state["sample"])
        self._row = int(state["row"])
        self._waiting = None
        if state["waiting"]:
            self._waiting = self._read(self._sample)
            self._ledger.load_state_dict(state["ledger"])  # it was counted when it was read the first time

    def _reached(self) -> int:
        return self._sample


def _counted_through(packed: PackedSamples) -> list[tuple[int, int, int]]:
    """The places of a row's tiles, its pictures counted through all its samples."""
    out: list[tuple[int, int, int]] = []
    first = 0
    for row in packed.rows:
        places = row.decoded.places
        out += [(first + picture, line, column) for picture, line, column in places]
        first += len({picture for picture, _, _ in places})
    return out
