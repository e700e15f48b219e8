"""Which of two answers a model holds likelier: a right one, or the same with one thing made wrong. Source: povid.

n samples, S statistics of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vlm.config.errors import RequestError, RunFailed
from vlm.data.corruption import RULES, corrupt, nouns_of
from vlm.evaluation.controlled import Figures, controlled, ratio
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result
from vlm.evaluation.shuffling import Control
from vlm.evaluation.task import Fields, as_fields
from vlm.evaluation.writing import Ask, Integers, WritingTask, arms_of, batches, need, prompts_of, texts_at
from vlm.types.random import draw_key

Floats = NDArray[np.float64]

GIVEN = "given"
"""The rule of a pair whose wrong answer the data bring."""


class PreferenceTaskOptions(WritingTask):
    """Percent of pairs whose right answer has the greater probability, and by how many nats; log-probabilities of an
    answer are summed over its tokens, the one that ends it included."""

    task: Literal["preference"] = "preference"
    controls: tuple[Control, ...] = Field((), description="as for vqa: shuffled, none")
    decoding: dict[str, Any] = Field({}, max_length=0, description="nothing is written")
    prompt: str = Field("Describe the picture.", min_length=1, description="what the user says to each picture")
    preferred: Fields | None = Field(
        None, description="field with the right answer, or several fields; of several texts the first; default: the text column"
    )
    rejected: str | None = Field(None, description="field with a wrong answer; where it is missing, the rules make one")
    rules: tuple[Literal["object", "relation", "attribute"], ...] = Field(
        ("object", "relation", "attribute"), min_length=1, description="what may be made wrong"
    )

    @model_validator(mode="after")
    def _writes_nothing(self) -> PreferenceTaskOptions:
        if "max_new_tokens" in self.model_fields_set:
            raise ValueError("max_new_tokens: this task writes nothing; leave it out")
        return self

    def run(self, samples: Pictured, batch: int) -> Result:
        return preference(samples, self, batch)


@dataclass(frozen=True)
class Pair:
    """Two answers to one sample. rule: what was made wrong, or `given`."""

    sample: int
    right: str
    wrong: str
    rule: str


def pairs_of(samples: Pictured, options: PreferenceTaskOptions) -> list[Pair]:
    """One pair a sample; one without a right answer, or of whose words no rule makes a wrong one, is left out.

    A pair hangs on the seed and the sample's key alone, so two models are asked the same.
    """
    if options.preferred is None:
        texts = [own[:1] for own in samples.texts]
    else:
        texts = [texts_at(fields, as_fields(options.preferred))[:1] for fields in samples.fields]
    nouns = nouns_of(text for own in texts for text in own)
    out = []
    for number, own in enumerate(texts):
        if not own:
            continue
        brought = texts_at(samples.fields[number], [options.rejected]) if options.rejected is not None else ()
        if brought:
            out.append(Pair(number, own[0], brought[0], GIVEN))
        elif made := corrupt(own[0], options.rules, draw_key(options.seed, "preference", samples.keys[number]), nouns):
            out.append(Pair(number, own[0], made.text, made.rule))
    return out


def log_probabilities(
    samples: Pictured, asks: Sequence[Ask], texts: Sequence[str], shown: Integers | None, batch: int
) -> Floats:
    """[n] log p of each text as the answer to its question. Raises RunFailed for numbers that are not finite."""
    score: Any = samples.generator
    out = np.zeros(len(asks))
    for part in batches(len(asks), batch):
        prompts = prompts_of(samples, [asks[i] for i in part], shown)
        for i, nats in zip(part, score.nats(prompts, [texts[i] for i in part]), strict=True):
            out[i] = -float(np.asarray(nats, np.float64).sum())
            if not math.isfinite(out[i]):
                raise RunFailed(
                    "the model gives probabilities that are not finite",
                    remedy="its weights are unusable: check the training loss, or evaluate an earlier checkpoint",
                )
        samples.said(part.stop, "answers scored")
    return out


def preference_statistics(pairs: Sequence[Pair], margins: Floats, rules: Sequence[str]) -> Floats:
    """[n, 3 + 2 R] right, 1 and margin; for each rule right and 1. Of equal probabilities half is right."""
    out = np.zeros((len(pairs), 3 + 2 * len(rules)))
    for i, (pair, margin) in enumerate(zip(pairs, margins.tolist(), strict=True)):
        right = 0.5 * ((margin > 0) + (margin >= 0))
        place = 3 + 2 * rules.index(pair.rule)
        out[i, :3] = right, 1, margin
        out[i, place : place + 2] = right, 1
    return out


def preference_figures(rules: Sequence[str]) -> Figures:
    """accuracy, margin, and RULE/accuracy of each rule."""

    def of(sums: Floats) -> Floats:
        parts = [ratio(sums[..., 0], sums[..., 1]), ratio(sums[..., 2], sums[..., 1])]
        parts += [ratio(sums[..., 3 + 2 * k], sums[..., 4 + 2 * k]) for k in range(len(rules))]
        return np.stack(parts, axis=-1)

    counted: tuple[tuple[int, ...] | None, ...] = ((1,), None, *((4 + 2 * k,) for k in range(len(rules))))
    scale = (100.0, 1.0, *(100.0 for _ in rules))
    return Figures(("accuracy", "margin", *(f"{rule}/accuracy" for rule in rules)), of, scale, counted)


def preference(samples: Pictured, options: PreferenceTaskOptions, batch: int) -> Result:
    """Raises DataError when there is no pair, RequestError for a model that cannot score texts."""
    if not hasattr(samples.generator, "nats"):
        raise RequestError("preference needs a model that can score texts", remedy="evaluate the run instead of its bundle")
    pairs = pairs_of(samples, options)
    need(len(pairs), "no answer of which a wrong one can be made", "name the fields: preferred, rejected")
    rules = [rule for rule in (*RULES, GIVEN) if any(pair.rule == rule for pair in pairs)]
    asks = [Ask(pair.sample, options.prompt) for pair in pairs]
    arms, permutes = arms_of(samples, options.controls, options.seed)
    statistics = {}
    for arm, shown in arms.items():
        right, wrong = (log_probabilities(samples, asks, texts, shown, batch) for texts in zip(*((p.right, p.wrong) for p in pairs)))
        statistics[arm] = preference_statistics(pairs, right - wrong, rules)
    concepts = samples.concepts()
    found = controlled(
        statistics,
        preference_figures(rules),
        clusters=[concepts[pair.sample] for pair in pairs],
        resamples=options.resamples,
        seed=options.seed,
    )
    details: dict[str, Any] = {
        "pairs": {rule: sum(pair.rule == rule for pair in pairs) for rule in rules},
        "left_out": len(samples) - len(pairs),
        "clusters": found.clusters,
    }
    if "shuffled" in arms:
        details["shuffled"] = "permutation" if permutes else "drawn with replacement: one concept has over half"
    return Result(
        task="preference",
        name=options.title,
        samples=len(pairs),
        metrics=found.metrics,
        intervals=found.intervals,
        chance={"accuracy": 50.0},
        details=details,
    )
