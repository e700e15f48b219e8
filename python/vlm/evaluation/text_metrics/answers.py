"""Short answers: when two are the same, and yes and no as a classifier's output.

n questions. Sources: the answer normalisation of the VQA challenge; debias-lvlm (yes-no figures, calibration error).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

ARTICLES = frozenset({"a", "an", "the"})
_COUNT = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)
NUMBERS = {word: str(value) for value, word in enumerate(_COUNT.split())} | {"none": "0"}
YES, NO = ("yes",), ("no",)

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_APOSTROPHES = re.compile("['’ʼ`]")

Floats = NDArray[np.float64]
Said = Literal["yes", "no", "other"]

YES_NO_STATISTICS = 5
YES_NO_FIGURES = ("accuracy", "precision", "recall", "f1", "yes_rate")
YES_NO_COUNTED: tuple[tuple[int, ...] | None, ...] = ((0, 1, 2, 3, 4), (0, 1), (0, 3), None, (0, 1, 2, 3, 4))
"""The statistics that count the observations of each figure; F1 is no share of observations."""


def normalise_answer(text: str) -> str:
    """The answer as it is compared: "The Two  cats." -> "2 cats".

    Lower case in compatibility form; apostrophes and the commas of thousands vanish, a point between digits stays,
    other punctuation separates; number words up to twenty become digits (none is 0); articles go unless nothing else
    is left.
    """
    plain = _APOSTROPHES.sub("", unicodedata.normalize("NFKC", text).lower())
    plain = _THOUSANDS.sub("", plain)
    kept = []
    for i, character in enumerate(plain):
        between = 0 < i < len(plain) - 1 and plain[i - 1].isdigit() and plain[i + 1].isdigit()
        sign = character == "-" and i + 1 < len(plain) and plain[i + 1].isdigit() and plain[i - 1 : i] in ("", " ")
        good = unicodedata.category(character)[0] in "LNM" or (character == "." and between) or sign
        kept.append(character if good else " ")
    parts = "".join(kept).split()
    parts = [part for part in parts if part not in ARTICLES] or parts
    return " ".join(NUMBERS.get(part, part) for part in parts)


def exact(answer: str, references: Sequence[str]) -> bool:
    """Whether the answer is one of the references after `normalise_answer`."""
    said = normalise_answer(answer)
    return any(said == normalise_answer(reference) for reference in references)


def said_yes(answer: str, yes: Sequence[str] = YES, no: Sequence[str] = NO) -> Said:
    """What the first word of an answer says: "Yes, it is." is yes."""
    first = next(iter(normalise_answer(answer).split()), "")
    return "yes" if first in yes else "no" if first in no else "other"


def yes_no_statistics(said: Sequence[Said], truth: Sequence[bool]) -> Floats:
    """[n, 5] one-hot: right yes, wrong yes, right no, wrong no or other where yes is true, other where no is true.

    Sums of rows are what `yes_no_of` reads. An answer that is neither is wrong and no yes.
    """
    out = np.zeros((len(truth), YES_NO_STATISTICS))
    for i, (answer, true) in enumerate(zip(said, truth, strict=True)):
        if answer == "yes":
            out[i, 0 if true else 1] = 1
        elif true:
            out[i, 3] = 1
        else:
            out[i, 2 if answer == "no" else 4] = 1
    return out


def yes_no_of(sums: Floats) -> Floats:
    """[..., 5] summed statistics -> [..., 5] accuracy, precision, recall, F1 and yes-rate, 0..1.

    Yes is the positive class. Precision without any yes, recall without any true yes and F1 without either are 0.
    """
    right, wrong, denied, missed, _ = (sums[..., k] for k in range(YES_NO_STATISTICS))
    total = sums.sum(-1)

    def share(top: Floats, bottom: Floats) -> Floats:
        return np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom > 0)

    return np.stack(
        [
            share(right + denied, total),
            share(right, right + wrong),
            share(right, right + missed),
            share(2 * right, 2 * right + wrong + missed),
            share(right + wrong, total),
        ],
        axis=-1,
    )


def calibration_error(confidence: Floats, right: NDArray[np.bool_], bins: int = 10) -> float:
    """The expected calibration error, 0..1: |mean confidence - share right| over equal bins of confidence, weighted
    by their sizes. confidence [n] in 0..1; a value on an edge belongs to the bin below it. 0 without observations."""
    if not len(confidence):
        return 0.0
    place = np.clip(np.ceil(np.asarray(confidence) * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(place, np.asarray(confidence, np.float64) - np.asarray(right, np.float64), minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))
