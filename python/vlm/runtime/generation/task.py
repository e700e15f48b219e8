"""One call of the loop, checked before any work: prompts, their keys and negatives, and what becomes of logits.

n rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlm.config.errors import RequestError
from vlm.runtime.generation import logits as rules
from vlm.runtime.generation.branches import Branches, Negatives
from vlm.runtime.generation.draws import draw, row_key
from vlm.runtime.generation.protocols import Generator, Prompt
from vlm.runtime.generation.settings import Decoding


@dataclass(frozen=True)
class Task:
    """n prompts to answer. branches: for each prompt itself and its negative prompts; keys: what its draws hang on."""

    generator: Generator
    decoding: Decoding
    branches: tuple[tuple[Prompt, ...], ...]
    keys: tuple[int, ...]

    def chunks(self, size: int | None) -> list[range]:
        """The prompts in groups of at most `size`."""
        n = len(self.keys)
        size = size or max(n, 1)
        return [range(start, min(start + size, n)) for start in range(0, n, size)]

    def steppers(self) -> Branches:
        """A stepper for each branch, without rows. There must be a prompt."""
        return Branches([self.generator.stepper() for _ in self.branches[0]])

    def start(self, branches: Branches, chosen: range) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits [n, V] after some of the prompts, and of their negatives (None: there are none)."""
        return branches.start(list(zip(*(self.branches[i] for i in chosen))))


def plan(
    generator: Generator, prompts: Sequence[Prompt], decoding: Decoding, keys: Sequence[int | str] | None, negatives: Negatives | None
) -> Task:
    """Raises RequestError for a prompt that is empty or leaves no room for the answer, and for a contrast that cannot be made."""
    if keys is None:
        keys = range(len(prompts))
    if len(keys) != len(prompts):
        raise RequestError(f"{len(keys)} keys for {len(prompts)} prompts, expected one each")
    if decoding.contrast is not None and negatives is None:
        raise RequestError("a contrast needs the placeholder of pictures", where="decoding.contrast", remedy="give `negatives`")
    branches = []
    for number, prompt in enumerate(prompts):
        contrast = decoding.contrast
        others = negatives.of(prompt, contrast.negative) if contrast is not None and negatives is not None else ()
        branches.append((prompt, *others))
        for one in branches[-1]:
            _fits(generator, one, decoding.max_new_tokens, f"prompt {number}")
    return Task(generator, decoding, tuple(branches), tuple(row_key(decoding.seed, key) for key in keys))


def _fits(generator: Generator, prompt: Prompt, new: int, where: str) -> None:
    if not len(prompt.ids):
        raise RequestError("has no tokens", where=where)
    positions = generator.positions(prompt)
    if positions + new > generator.length:
        room = generator.length - positions
        raise RequestError(
            f"takes {positions} positions and the answer up to {new}, but {generator.name} has {generator.length} together",
            where=where,
            remedy=f"max_new_tokens at most {room}" if room > 0 else "shorten the prompt or give fewer pictures",
        )


class Processor:
    """Logits of both branches to those that are chosen from.

    Order: allowed tokens, contrast and its cut-off by the original logits, repetition penalty. What is not allowed is out
    before the cut-off, so that at least one token always stays.
    """

    def __init__(self, task: Task, vocab_size: int) -> None:
        self._decoding = decoding = task.decoding
        self._vocab_size = vocab_size
        self._ends = np.array(sorted(i for i in task.generator.eos_ids if 0 <= i < vocab_size), np.int64)
        self._mask = _vocabulary_mask(decoding, vocab_size)
        self._early = self._mask
        if decoding.min_new_tokens and len(self._ends):
            self._early = np.ones(vocab_size, bool) if self._mask is None else self._mask.copy()
            self._early[self._ends] = False
        if self._early is not None and not self._early.any():
            raise RequestError("no token is allowed", where="decoding", remedy="allow tokens beside those that end an answer")

    def __call__(self, logits: np.ndarray, negative: np.ndarray | None, written: Sequence[Written], step: int) -> np.ndarray:
        """[n, V]; written: the n rows so far; step: tokens that each of them has written."""
        decoding = self._decoding
        mask = self._early if step < decoding.min_new_tokens else self._mask
        if mask is not None:
            logits = rules.restrict(logits, mask)
            if not np.isfinite(logits.max(axis=-1)).all():
                raise RequestError("no token that is allowed has a finite logit", where="decoding.allowed")
        if negative is not None and decoding.contrast is not None:
            logits = rules.contrast(logits, negative, decoding.contrast.alpha, decoding.contrast.beta)
        if decoding.repetition_penalty != 1:
            rows = [rules.repetition_penalty(row, self._seen(w), decoding.repetition_penalty) for row, w in zip(logits, written)]
            logits = np.stack(rows)
        return logits

    def _seen(self, written: Written) -> np.ndarray:
        ids = np.fromiter((*written.prompt.ids, *written.ids), np.int64)
        return ids[(ids >= 0) & (ids < self._vocab_size)]


@dataclass
class Written:
    """What stands in a row: the prompt and the tokens after it."""

    prompt: Prompt
    ids: list[int]


def _vocabulary_mask(decoding: Decoding, vocab_size: int) -> np.ndarray | None:
    if decoding.allowed is None and not decoding.forbidden:
        return None
    for i in (*(decoding.allowed or ()), *decoding.forbidden):
        if not 0 <= i < vocab_size:
            raise RequestError(f"token {i} is not in the vocabulary of {vocab_size}", where="decoding.allowed, decoding.forbidden")
    mask = np.full(vocab_size, decoding.allowed is None)
    if decoding.allowed is not None:
        mask[np.asarray(decoding.allowed, np.int64)] = True
    mask[np.asarray(decoding.forbidden, np.int64)] = False
    return mask


def sample(logits: np.ndarray, decoding: Decoding, u: float) -> int:
    """A token of one row [V]: top-k, temperature, top-p, min-p, then the draw u in [0, 1)."""
    if decoding.temperature == 0:
        return int(logits.argmax())
    # Dividing keeps the order, so top-k may come first: all that follows then sees k numbers.
    ids = np.flatnonzero(rules.top_k(logits, decoding.top_k) > -np.inf)
    x = rules.temperature(logits[ids].astype(np.float64), decoding.temperature)
    x = rules.min_p(rules.top_p(x, decoding.top_p), decoding.min_p)
    return int(ids[draw(x, u)])
