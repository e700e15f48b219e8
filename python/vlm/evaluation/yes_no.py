"""Probabilities of yes and no as the first token of an answer. Source: debias-lvlm.

q questions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from vlm.config.errors import RequestError
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.writing import Ask, Integers, batches, prompts_of

if TYPE_CHECKING:
    from vlm.runtime.generation import Calibration

Floats = NDArray[np.float64]


def surface_forms(samples: Pictured, label: str, vocab_size: int) -> Integers:
    """The tokens whose text is the label but for case and white space. Raises RequestError when there is none."""
    text = samples.generator.text
    found = [i for i in range(vocab_size) if text([i]).strip().lower() == label]
    if not found:
        raise RequestError(
            f"no single token of the vocabulary says {label!r}: its probability cannot be read off the first token",
            remedy="leave calibration out",
        )
    return np.array(found, dtype=np.int64)


def yes_confidence(samples: Pictured, asks: Sequence[Ask], shown: Integers | None, batch: int) -> Floats:
    """[q] p(yes) / (p(yes) + p(no)) of the first token, summed over each word's spellings."""
    out = np.zeros(len(asks))
    forms: list[Integers] | None = None
    for part in batches(len(asks), batch):
        stepper = samples.generator.stepper()
        if forms is None:
            forms = [surface_forms(samples, label, stepper.vocab_size) for label in ("yes", "no")]
        logits = np.asarray(stepper.start(prompts_of(samples, [asks[i] for i in part], shown)), np.float64)
        yes, no = (np.logaddexp.reduce(logits[:, ids], axis=1) for ids in forms)
        out[part.start : part.stop] = 1 / (1 + np.exp(np.clip(no - yes, -700, 700)))
    return out


def calibrated_yes(
    samples: Pictured, asks: Sequence[Ask], shown: Integers | None, calibration: Calibration, batch: int
) -> Floats:
    """[q] p(yes) of yes and no, corrected by their probabilities without the picture.

    Raises RequestError for a model without pictures, and for a vocabulary in which yes or no is no single token.
    """
    from vlm.runtime.generation import answer, calibrate

    generator = samples.generator
    negatives = getattr(generator, "negatives", None)
    if negatives is None:
        raise RequestError("calibrate needs a model that reads pictures, and whose pictures can be taken away")
    ids = [surface_forms(samples, label, generator.stepper().vocab_size) for label in ("yes", "no")]
    given, free = np.empty((len(asks), 2)), np.empty((len(asks), 2))
    for part in batches(len(asks), batch):
        rows = slice(part.start, part.stop)
        prompts = prompts_of(samples, [asks[i] for i in part], shown)
        found = answer(generator, prompts, ids, replace(calibration, scope="question"), negatives=negatives)
        given[rows], free[rows] = found.given, found.content_free
        samples.said(part.stop, "answers calibrated")
    if calibration.scope == "dataset":
        free[:] = free.mean(axis=0)  # over all questions, not those of a batch
    out: Floats = calibrate(given, free, calibration.mode, calibration.eps)[:, 0]
    return out
