"""Probabilities of yes and no as the first token of an answer. Source: debias-lvlm.

q questions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm.config.errors import RequestError
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.writing import Ask, Integers, batches, prompts_of

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
