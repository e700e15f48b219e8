"""CIDEr-D: agreement with the references in rare n-grams.

n samples. Source: Vedantam, Zitnick and Parikh, "CIDEr: Consensus-based image description evaluation"; the numbers
follow the tool of the COCO caption task, but for its tokeniser.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation.text_metrics.words import Ngram, ngrams, words

ORDERS = 4
SIGMA = 6.0


@dataclass(frozen=True)
class _Vector:
    """A text: its weighted n-grams and their norms by order, and its number of words."""

    weights: list[dict[Ngram, float]]
    norms: list[float]
    length: int


class Cider:
    """Scores against fixed references: their document frequencies do not change with the candidates.

    references: each sample's texts, at least one. The weight of an n-gram is its count times log(n / samples whose
    references hold it), at least 1 sample; so with a single sample every weight and score is 0.
    """

    def __init__(self, references: Sequence[Sequence[str]], *, sigma: float = SIGMA) -> None:
        self.sigma = sigma
        counted = [[ngrams(words(text), ORDERS) for text in texts] for texts in references]
        self._holders: Counter[Ngram] = Counter()
        for texts in counted:
            self._holders.update({gram for counts in texts for gram in counts})
        self._samples = math.log(max(len(references), 1))
        self._references = [[self._vector(counts) for counts in texts] for texts in counted]

    def _vector(self, counts: Counter[Ngram]) -> _Vector:
        weights: list[dict[Ngram, float]] = [{} for _ in range(ORDERS)]
        for gram, times in counts.items():
            rarity = self._samples - math.log(max(1, self._holders.get(gram, 0)))
            weights[len(gram) - 1][gram] = times * rarity
        norms = [math.sqrt(math.fsum(v * v for v in part.values())) for part in weights]
        return _Vector(weights, norms, sum(times for gram, times in counts.items() if len(gram) == 1))

    def _likeness(self, candidate: _Vector, reference: _Vector) -> float:
        total = 0.0
        for ours, theirs, a, b in zip(candidate.weights, reference.weights, candidate.norms, reference.norms):
            if a > 0 and b > 0:
                # A candidate gains nothing by repeating a word: its weight counts up to the reference's.
                shared = math.fsum(
                    min(v, theirs[gram]) * theirs[gram] for gram, v in ours.items() if gram in theirs
                )
                total += shared / (a * b)
        apart = candidate.length - reference.length
        return total / ORDERS * math.exp(-(apart**2) / (2 * self.sigma**2))

    def scores(self, candidates: Sequence[str]) -> NDArray[np.float64]:
        """[n] 0..10, one a sample; their mean is the corpus score. Raises ValueError when the counts differ."""
        out = np.zeros(len(self._references))
        for i, (text, references) in enumerate(zip(candidates, self._references, strict=True)):
            vector = self._vector(ngrams(words(text), ORDERS))
            values = [self._likeness(vector, reference) for reference in references]
            out[i] = 10 * math.fsum(values) / len(values)
        return out


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """[n] CIDEr-D of each sample, with document frequencies over the given references."""
    return Cider(references).scores(candidates)
