"""Answers that begin and end at any time, written side by side over one cache (continuous batching).

n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.config.errors import RequestError, RunFailed
from vlm.runtime.generation.branches import check_logits
from vlm.runtime.generation.draws import uniform
from vlm.runtime.generation.events import Event
from vlm.runtime.generation.protocols import Generator, Prompt, Stepper
from vlm.runtime.generation.rows import Row
from vlm.runtime.generation.settings import Decoding
from vlm.runtime.generation.task import Processor, plan, sample


@dataclass(frozen=True)
class Request:
    """One answer to write. key: what its draws hang on beside the seed: with equal ones it is written alike in any company."""

    prompt: Prompt
    decoding: Decoding
    key: int | str


@dataclass(frozen=True, slots=True)
class Failed:
    """A row that ends without an answer; the others go on."""

    row: int
    error: RunFailed


class Rolling:
    """Rows that join and leave between two tokens; each has settings of its own.

    A row costs nothing once it has ended or was dropped. When `add` raises, the rows that were there go on; what the model
    raises in `step` leaves them in no usable state.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._running: _Rows | None = None  # `ids` are the tokens that each row was given last
        self._fresh: list[_Rows] = []  # have read their prompts; `logits` are those of the first token
        self._next = 0

    def __len__(self) -> int:
        """Rows that are being written."""
        return sum(len(part.rows) for part in self._parts())

    def add(self, requests: Sequence[Request]) -> list[int]:
        """Reads the prompts, together. Returns the row that the events of each say, never used twice.

        Raises RequestError before any work: for an empty or too long prompt, beams and contrasts, tokens that are not there.
        """
        rows: list[_Rolling] = []
        stepper = self._generator.stepper()
        for request in requests:
            decoding = request.decoding
            if decoding.strategy == "beam" or decoding.contrast is not None:
                raise RequestError("beams and contrasts are written in batches of their own", where="decoding")
            task = plan(self._generator, [request.prompt], decoding, [request.key], None)
            rows.append(_Rolling(Row(task, 0, self._next + len(rows)), decoding, Processor(task, stepper.vocab_size)))
        if rows:
            self._next += len(rows)
            self._fresh.append(_Rows(stepper, rows, stepper.start([row.row.prompt for row in rows])))
        return [row.row.name for row in rows]

    def drop(self, names: Collection[int]) -> None:
        """Rows that nobody reads any more; those that have ended already are not missed."""
        for part in self._parts():
            part.keep([i for i, row in enumerate(part.rows) if row.row.name not in names])
        self._forget_empty()

    def step(self) -> list[Event | Failed]:
        """One more token for each row, those added since the last step included."""
        running = self._running
        if running is not None:
            running.logits = running.stepper.advance(running.ids)
        for fresh in self._fresh:
            running = fresh if running is None else running.joined(fresh)
        self._running, self._fresh = running, []
        if running is None:
            return []
        told: list[Event | Failed] = []
        tokens, alive = np.zeros(len(running.rows), np.int64), []
        for i, (row, logits) in enumerate(zip(running.rows, running.logits, strict=True)):
            try:
                tokens[i] = row.choose(logits[None])
            except RunFailed as error:
                told.append(Failed(row.row.name, error))
                continue
            full = len(row.row.ids) + 1 == row.decoding.max_new_tokens
            event = row.row.take(int(tokens[i]), self._generator.eos_ids, full)
            told.append(event)
            if event.finish_reason is None:
                alive.append(i)
        running.ids = tokens
        running.keep(alive)
        self._forget_empty()
        return told

    def _parts(self) -> list[_Rows]:
        return self._fresh if self._running is None else [self._running, *self._fresh]

    def _forget_empty(self) -> None:
        if self._running is not None and not self._running.rows:
            self._running = None
        self._fresh = [part for part in self._fresh if part.rows]


class _Rolling:
    """A row with its settings."""

    def __init__(self, row: Row, decoding: Decoding, process: Processor) -> None:
        self.row, self.decoding, self._process = row, decoding, process

    def choose(self, logits: np.ndarray) -> int:
        """The next token, of logits [1, V]. Raises RunFailed for logits that are not finite."""
        check_logits(logits)
        step = len(self.row.ids)
        chosen = self._process(logits, None, [self.row], step)[0]
        if self.decoding.strategy == "greedy":
            return int(chosen.argmax())
        return sample(chosen, self.decoding, uniform(self.row.key, step))


class _Rows:
    """Rows of one stepper. logits [n, V] of the next token, where it was not chosen yet; ids int64 [n]: it, once it was."""

    def __init__(self, stepper: Stepper, rows: list[_Rolling], logits: np.ndarray) -> None:
        self.stepper, self.rows, self.logits = stepper, rows, logits
        self.ids = np.zeros(len(rows), np.int64)

    def keep(self, places: list[int]) -> None:
        """The rows at `places`, ascending."""
        if len(places) == len(self.rows):
            return
        index = np.array(places, np.int64)
        if places:
            self.stepper.reorder(index)
        self.rows, self.logits, self.ids = [self.rows[i] for i in places], self.logits[index], self.ids[index]

    def joined(self, other: _Rows) -> _Rows:
        self.stepper.join(other.stepper)
        return _Rows(self.stepper, [*self.rows, *other.rows], np.concatenate([self.logits, other.logits]))
