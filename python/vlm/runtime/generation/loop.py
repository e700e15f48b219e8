"""Answers to prompts, in batches whose rows end at different times: one loop for torch models and bundles.

n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.runtime.generation.beam import beam_search
from vlm.runtime.generation.branches import Branches, Negatives
from vlm.runtime.generation.draws import uniform
from vlm.runtime.generation.events import Event, FinishReason
from vlm.runtime.generation.protocols import Generator, Prompt
from vlm.runtime.generation.rows import Row
from vlm.runtime.generation.settings import Decoding
from vlm.runtime.generation.task import Processor, Task, plan, sample


@dataclass(frozen=True)
class Completion:
    """One answer. ids: its tokens, without one that ends it; text: without a stop text; score: of beam search only."""

    ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    score: float | None = None


def generate(
    generator: Generator,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    keys: Sequence[int | str] | None = None,
    negatives: Negatives | None = None,
    batch_size: int | None = None,
) -> list[Completion]:
    """The answers in order of the prompts. Arguments and errors: `stream`."""
    ids: list[list[int]] = [[] for _ in prompts]
    texts: list[list[str]] = [[] for _ in prompts]
    last: dict[int, tuple[FinishReason, float | None]] = {}
    for event in stream(generator, prompts, decoding, keys=keys, negatives=negatives, batch_size=batch_size):
        texts[event.row].append(event.text)
        if event.finish_reason is not None:
            last[event.row] = event.finish_reason, event.score
        if event.finish_reason != "stop" or event.token not in generator.eos_ids:
            ids[event.row].append(event.token)
    return [Completion(tuple(ids[row]), "".join(texts[row]), *last[row]) for row in range(len(prompts))]


def stream(
    generator: Generator,
    prompts: Sequence[Prompt],
    decoding: Decoding,
    *,
    keys: Sequence[int | str] | None = None,
    negatives: Negatives | None = None,
    batch_size: int | None = None,
) -> Iterator[Event]:
    """One event a token as it comes; with beams, each answer's events when its search has ended.

    keys: what the draws of each prompt hang on beside the seed, its number among `prompts` unless given; with a key of its
    own a row decodes alike alone and in any batch. negatives: needed by `contrast`. batch_size: rows at once, default all.
    Raises RequestError at once, before any work, for what cannot be done; RunFailed for logits that are not finite.
    """
    task = plan(generator, prompts, decoding, keys, negatives)
    if not prompts:
        return iter(())
    branches = task.steppers()
    return _events(task, Processor(task, branches.vocab_size), branches, batch_size)


def _events(task: Task, process: Processor, branches: Branches, batch_size: int | None) -> Iterator[Event]:
    write = beam_search if task.decoding.strategy == "beam" else _token_by_token
    for number, chosen in enumerate(task.chunks(batch_size)):
        yield from write(task, process, branches if number == 0 else task.steppers(), chosen)


def _token_by_token(task: Task, process: Processor, branches: Branches, chosen: range) -> Iterator[Event]:
    decoding, eos_ids = task.decoding, task.generator.eos_ids
    logits, negative = task.start(branches, chosen)
    rows = [Row(task, number) for number in chosen]
    for step in range(decoding.max_new_tokens):
        logits = process(logits, negative, rows, step)
        if decoding.strategy == "greedy":
            tokens = logits.argmax(axis=-1).astype(np.int64, copy=False)
        else:
            tokens = np.array([sample(x, decoding, uniform(row.key, step)) for x, row in zip(logits, rows)], np.int64)
        alive = []
        for i, row in enumerate(rows):
            event = row.take(int(tokens[i]), eos_ids, step + 1 == decoding.max_new_tokens)
            if event.finish_reason is None:
                alive.append(i)
            yield event
        if not alive:
            return
        if len(alive) < len(rows):
            index = np.array(alive, np.int64)
            branches.reorder(index)
            rows, tokens = [rows[i] for i in alive], tokens[index]
        logits, negative = branches.advance(tokens)
