"""How closely a model follows another one (a student its teacher, a quantised model the whole one) as both write.

n samples, V vocabulary. Source: llava-kd (forward divergence over the positions of the answer).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vlm.config.errors import RequestError
from vlm.evaluation.controlled import MAIN, Figures, controlled, ratio
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result
from vlm.evaluation.shuffling import Control
from vlm.evaluation.writing import Ask, WritingTask, batches, prompts_of

Floats = NDArray[np.float64]

_FIGURES = Figures(
    ("same_answer", "same_token", "divergence"),
    lambda s: np.stack([ratio(s[..., 0], s[..., 1]), ratio(s[..., 2], s[..., 3]), ratio(s[..., 4], s[..., 3])], -1),
    (100.0, 100.0, 1.0),
    ((1,), (3,), None),
)


class AgreementOptions(WritingTask):
    """Percent of greedy answers of the other model that this one would write too, of their tokens, and the divergence
    KL(other || this) in nats a token, all along the other's answers. Both need the same vocabulary."""

    task: Literal["agreement"] = "agreement"
    other: str = Field(description="run, model directory or bundle of the model that is followed")
    controls: tuple[Control, ...] = Field((), max_length=0, description="has no controls")
    decoding: dict[str, Any] = Field({}, max_length=0, description="is always greedy")
    prompt: str = Field("Describe the picture.", min_length=1, description="what the user says to each picture")
    max_new_tokens: int = Field(16, ge=1, description="longest answer in tokens")

    def run(self, samples: Pictured, batch: int) -> Result:
        from vlm.evaluation.encoder import open_model

        other = open_model(self.other)
        if not hasattr(other, "stepper"):
            raise RequestError("the other model writes nothing", where=self.other, remedy="give one that answers")
        return agreement(samples, other, self, batch)


def divergence(wanted: NDArray[Any], given: NDArray[Any]) -> Floats:
    """KL(softmax(wanted) || softmax(given)) of rows [n, V] of logits, [n] float64; 0 for equal rows. A token that
    `wanted` rules out (-inf) adds nothing."""
    wanted, given = (np.asarray(x, np.float64) for x in (wanted, given))
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (wanted, given))
    with np.errstate(invalid="ignore"):
        return np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(-1)


def agreement_statistics(
    samples: Pictured, other: Any, asks: list[Ask], decoding: AgreementOptions, batch: int
) -> Floats:
    """[n, 5] whole answer the same, 1, tokens the same, tokens, summed divergence; the end token counts as one.

    Raises RequestError when the vocabularies differ.
    """
    theirs = replace(samples, generator=other, _cache=OrderedDict(), _held=0)
    shown = np.arange(len(samples))
    out = np.zeros((len(asks), 5))
    for part in batches(len(asks), batch):
        chosen = [asks[i] for i in part]
        leader, follower = other.stepper(), samples.generator.stepper()
        if leader.vocab_size != follower.vocab_size:
            raise RequestError(
                f"the models have {follower.vocab_size} and {leader.vocab_size} tokens: agreement compares token by token",
                remedy="compare their answers with vqa or caption instead",
            )
        wanted, given = leader.start(prompts_of(theirs, chosen, shown)), follower.start(prompts_of(samples, chosen, shown))
        rows = np.arange(part.start, part.stop)
        for step in range(decoding.max_new_tokens):
            token = wanted.argmax(axis=-1).astype(np.int64)
            out[rows, 2] += given.argmax(axis=-1) == token
            out[rows, 3] += 1
            out[rows, 4] += divergence(wanted, given)
            alive = np.flatnonzero([int(t) not in other.eos_ids for t in token])
            if not len(alive) or step + 1 == decoding.max_new_tokens:
                break
            if len(alive) < len(rows):
                leader.reorder(alive)
                follower.reorder(alive)
                rows, token = rows[alive], token[alive]
            wanted, given = leader.advance(token), follower.advance(token)
        samples.said(part.stop, "answers compared")
    out[:, 0], out[:, 1] = out[:, 2] == out[:, 3], 1
    return out


def agreement(samples: Pictured, other: Any, options: AgreementOptions, batch: int) -> Result:
    """Raises RequestError when the two models' vocabularies differ."""
    asks = [Ask(i, options.prompt) for i in range(len(samples))]
    rows = agreement_statistics(samples, other, asks, options, batch)
    found = controlled(
        {MAIN: rows}, _FIGURES, clusters=samples.concepts(), resamples=options.resamples, seed=options.seed
    )
    details = {"other": options.other, "tokens": int(rows[:, 3].sum()), "clusters": found.clusters}
    return Result("agreement", options.title, len(samples), found.metrics, found.intervals, {}, details)
