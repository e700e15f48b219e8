"""Answers from a closed set, corrected by what the model says without its picture. Source: debias-lvlm.

n questions, C labels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from vlm.config.errors import RequestError
from vlm.runtime.generation.branches import Branches, Negatives
from vlm.runtime.generation.protocols import Generator, Prompt
from vlm.runtime.generation.settings import Decoding, NegativeKind
from vlm.runtime.generation.task import plan

Mode = Literal["diagonal", "identity"]
Scope = Literal["question", "dataset"]


@dataclass(frozen=True)
class Calibration:
    """content_free: what is read instead of the picture; scope: one correction a question, or their mean for all.

    Raises RequestError for a value out of its range.
    """

    content_free: NegativeKind = "none+unk"
    mode: Mode = "diagonal"
    eps: float = 1e-4
    scope: Scope = "question"

    def __post_init__(self) -> None:
        choices = {"content_free": get_args(NegativeKind), "mode": get_args(Mode), "scope": get_args(Scope)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise RequestError(f"is {getattr(self, name)!r}, expected one of {', '.join(allowed)}", where=f"calibrate.{name}")
        if not 0 < self.eps < 1:
            raise RequestError(f"is {self.eps!r}, expected above 0 and below 1", where="calibrate.eps")


@dataclass(frozen=True)
class Answers:
    """Distributions over C labels, float64 [n, C]: with the picture, without it, and calibrated."""

    given: np.ndarray
    content_free: np.ndarray
    calibrated: np.ndarray


def calibrate(p: np.ndarray, p_cf: np.ndarray, mode: Mode = "diagonal", eps: float = 1e-4) -> np.ndarray:
    """Distributions float64 [..., C] from those with the picture and without it, which broadcast; both are normalised first.

    diagonal: p / (p_cf + eps), normalised. identity: the softmax of p - (p_cf + eps); its sum is about 0, so dividing by it
    would turn the order around.
    """
    p = np.asarray(p, np.float64)
    p_cf = np.asarray(p_cf, np.float64)
    p = p / p.sum(axis=-1, keepdims=True)
    p_cf = p_cf / p_cf.sum(axis=-1, keepdims=True) + eps
    q = p / p_cf if mode == "diagonal" else np.exp(p - p_cf)
    return q / q.sum(axis=-1, keepdims=True)


def label_ids(text: Callable[[Sequence[int]], str], vocab_size: int, labels: Sequence[str]) -> list[np.ndarray]:
    """The tokens of each label: all whose text is the label once stripped and in lower case.

    Raises RequestError for a label without one, and for labels that are the same.
    """
    wanted = [label.strip().lower() for label in labels]
    if len(set(wanted)) < len(wanted):
        raise RequestError("two labels are the same in lower case", where=f"labels {', '.join(labels)}")
    found: dict[str, list[int]] = {label: [] for label in wanted}
    for token in range(vocab_size):
        if (form := text([token]).strip().lower()) in found:
            found[form].append(token)
    for label, name in zip(wanted, labels):
        if not found[label]:
            raise RequestError("no token of the vocabulary is this label", where=f"label {name!r}", remedy="use labels of one token")
    return [np.array(found[label], np.int64) for label in wanted]


def label_probabilities(logits: np.ndarray, ids: Sequence[np.ndarray]) -> np.ndarray:
    """[n, V] to float64 [n, C]: softmax of the first token, summed over the tokens of each label, normalised over labels."""
    out = np.empty((len(logits), len(ids)))
    for c, tokens in enumerate(ids):
        x = logits[:, tokens].astype(np.float64)
        top = x.max(axis=1)
        out[:, c] = top + np.log(np.exp(x - top[:, None]).sum(axis=1))
    # In logarithms: labels of tiny probability keep their ratio.
    out = np.exp(out - out.max(axis=1, keepdims=True))
    return out / out.sum(axis=1, keepdims=True)


def answer(
    generator: Generator,
    prompts: Sequence[Prompt],
    ids: Sequence[np.ndarray],
    calibration: Calibration,
    *,
    negatives: Negatives,
    batch_size: int | None = None,
) -> Answers:
    """The labels' distributions for each prompt; ids: tokens of each label (`label_ids`).

    Two content-free prompts (none+unk) give the mean of their distributions. Raises RequestError as `stream` does.
    """
    task = plan(generator, prompts, Decoding(max_new_tokens=1), None, None)
    free = [negatives.of(prompt, calibration.content_free) for prompt in prompts]
    p, p_cf = np.empty((len(prompts), len(ids))), np.zeros((len(prompts), len(ids)))
    for chosen in task.chunks(batch_size):
        rows = slice(chosen.start, chosen.stop)
        p[rows] = label_probabilities(_first(generator, [prompts[i] for i in chosen]), ids)
        variants = list(zip(*(free[i] for i in chosen)))
        for variant in variants:
            p_cf[rows] += label_probabilities(_first(generator, variant), ids) / len(variants)
    if calibration.scope == "dataset" and len(prompts):
        p_cf[:] = p_cf.mean(axis=0)
    return Answers(p, p_cf, calibrate(p, p_cf, calibration.mode, calibration.eps))


def _first(generator: Generator, prompts: Sequence[Prompt]) -> np.ndarray:
    return Branches([generator.stepper()]).start([prompts])[0]
