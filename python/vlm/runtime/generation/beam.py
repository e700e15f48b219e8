"""Beam search: the B best beginnings of each answer side by side.

B beams, m rows of the stepper (all live beams of all prompts), V vocabulary. The score of an answer is the sum of its
log-probabilities over L ** length_penalty, L its tokens with the one that ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlm.runtime.generation.branches import Branches
from vlm.runtime.generation.events import Event, token_event
from vlm.runtime.generation.logits import log_softmax
from vlm.runtime.generation.task import Processor, Task, Written
from vlm.runtime.generation.text import AnswerText


@dataclass
class Beam(Written):
    """A beginning of an answer and the sum of its log-probabilities. text: kept only to find stop texts."""

    total: float
    text: AnswerText | None


class Search:
    """The beams of one prompt.

    As in beam search elsewhere, an ended answer counts only if it is among the B best continuations of its step. With
    early_stopping the search ends with B answers; without, when no beam can still beat the B best. One beam always stops
    with its first answer: it is greedy decoding.
    """

    def __init__(self, task: Task, number: int) -> None:
        self.task, self.number, self.decoding = task, number, task.decoding
        text = AnswerText(task.generator.text, self.decoding.stop) if self.decoding.stop else None
        self.live = [Beam(task.branches[number][0], [], 0.0, text)]
        self.done: list[tuple[float, list[int]]] = []

    def step(self, log_probability: np.ndarray) -> list[int]:
        """Extend the live beams by their log-probabilities float64 [b, V]; the beam that each new one continues."""
        width = self.decoding.beams
        full = len(self.live[0].ids) + 1 == self.decoding.max_new_tokens
        totals = (np.array([beam.total for beam in self.live])[:, None] + log_probability).reshape(-1)
        vocab_size = log_probability.shape[1]
        children: list[Beam] = []
        parents: list[int] = []
        # Continuations that end make room for no beam, so more than B may have to be looked at.
        for rank, place in enumerate(_ranked(totals, (1 + len(self.task.generator.eos_ids)) * width)):
            parent, token = divmod(int(place), vocab_size)
            child, ended = self._child(self.live[parent], token, float(totals[place]))
            if ended and rank < width:
                self._finish(child)
            elif not ended:
                children.append(child)
                parents.append(parent)
                if len(children) == width:
                    break
        self.live = children
        settled = self._settled()
        if full and not settled:
            for child in children:
                self._finish(child)
        if full or settled:
            self.live, parents = [], []
        return parents

    def _child(self, beam: Beam, token: int, total: float) -> tuple[Beam, bool]:
        text = beam.text.fork() if beam.text is not None else None
        ended = token in self.task.generator.eos_ids or (text is not None and text.push(token)[1])
        return Beam(beam.prompt, [*beam.ids, token], total, text), ended

    def _finish(self, beam: Beam) -> None:
        self.done.append((beam.total / len(beam.ids) ** self.decoding.length_penalty, beam.ids))

    def _settled(self) -> bool:
        width, penalty = self.decoding.beams, self.decoding.length_penalty
        if len(self.done) < width or not self.live:
            return not self.live
        if self.decoding.early_stopping or width == 1:
            return True
        worst = sorted((score for score, _ in self.done), reverse=True)[width - 1]
        # Totals only fall; dividing by a greater length raises a negative one, multiplying lowers it.
        length = self.decoding.max_new_tokens if penalty > 0 else len(self.live[0].ids) + 1
        return max(beam.total for beam in self.live) / length**penalty <= worst

    def events(self) -> Iterator[Event]:
        """The best answer, token by token; of equal ones the first found."""
        score, ids = max(self.done, key=lambda found: found[0])
        text = AnswerText(self.task.generator.text, self.decoding.stop)
        for count, token in enumerate(ids, 1):
            yield token_event(self.number, text, token, self.task.generator.eos_ids, count == len(ids), score)


def _ranked(totals: np.ndarray, first: int) -> Iterator[int]:
    """Places of the finite totals, greatest first, of equal ones the lower; more than `first` are sorted only on demand."""
    size, given = len(totals), 0
    while given < size:
        first = min(max(first, 1), size)
        least = max(np.partition(totals, size - first)[size - first], np.finfo(totals.dtype).min)
        places = np.flatnonzero(totals >= least)
        order = places[np.argsort(-totals[places], kind="stable")]
        yield from order[given:]
        if len(order) < first:
            return
        given, first = len(order), 8 * first


def beam_search(task: Task, process: Processor, branches: Branches, chosen: range) -> Iterator[Event]:
    """The events of some prompts of a task, each prompt's when its search has ended."""
    logits, negative = task.start(branches, chosen)
    searches = [Search(task, number) for number in chosen]
    for step in range(task.decoding.max_new_tokens):
        rows: list[Written] = [beam for search in searches for beam in search.live]
        log_probability = log_softmax(process(logits, negative, rows, step))
        index: list[int] = []
        start = 0
        for search in searches:
            stop = start + len(search.live)
            index += [start + parent for parent in search.step(log_probability[start:stop])]
            start = stop
            if not search.live:
                yield from search.events()
        searches = [search for search in searches if search.live]
        if not searches:
            return
        if index != list(range(len(rows))):
            branches.reorder(np.array(index, np.int64))
        logits, negative = branches.advance(np.array([beam.ids[-1] for search in searches for beam in search.live], np.int64))


