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


LABELS = ("yes", "no")


def label_forms(samples: Pictured, vocab_size: int) -> list[Integers]:
    """The tokens that yes and no begin with: those whose text is the word but for case and white space, or where there are
    none the first token of the word as the template writes it.

    Raises RequestError when there is none, and when both begin with the same.
    """
    text, answer_ids = samples.generator.text, getattr(samples.generator, "answer_ids", None)
    texts = [text([i]).strip().lower() for i in range(vocab_size)]
    found = []
    for label in LABELS:
        forms = [i for i, said in enumerate(texts) if said == label]
        found.append(forms or ([] if answer_ids is None else answer_ids(label)[:1]))
    if not all(found) or set(found[0]) & set(found[1]):
        missing = [label for label, forms in zip(LABELS, found) if not forms]
        problem = f"no single token of the vocabulary says {missing[0]!r}" if missing else "yes and no begin with the same token"
        raise RequestError(
            f"{problem}: their probabilities cannot be read off the first token",
            remedy="leave calibration and calibrate out",
        )
    return [np.array(forms, dtype=np.int64) for forms in found]


def yes_confidence(samples: Pictured, asks: Sequence[Ask], shown: Integers | None, batch: int) -> Floats:
    """[q] p(yes) / (p(yes) + p(no)) of the first token, summed over each word's spellings."""
    out = np.zeros(len(asks))
    forms: list[Integers] | None = None
    for part in batches(len(asks), batch):
        stepper = samples.generator.stepper()
        if forms is None:
            forms = label_forms(samples, stepper.vocab_size)
        logits = np.asarray(stepper.start(prompts_of(samples, [asks[i] for i in part], shown)), np.float64)
        yes, no = (np.logaddexp.reduce(logits[:, ids], axis=1) for ids in forms)
        out[part.start : part.stop] = 1 / (1 + np.exp(np.clip(no - yes, -700, 700)))
    return out


def calibrated_yes(
    samples: Pictured, asks: Sequence[Ask], shown: Integers | None, calibration: Calibration, batch: int
) -> Floats:
    """[q] p(yes) of yes and no, corrected by their probabilities without the picture.

    Raises RequestError for a model without pictures, and for a vocabulary in which the first token of yes and no tells nothing.
    """
    from vlm.runtime.generation import answer, calibrate

    generator = samples.generator
    negatives = getattr(generator, "negatives", None)
    if negatives is None:
        raise RequestError("calibrate needs a model that reads pictures, and whose pictures can be taken away")
    ids = label_forms(samples, generator.stepper().vocab_size)
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
