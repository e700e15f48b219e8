"""BLEU of a corpus, orders 1 to 4, with the brevity penalty over the closest reference lengths.

n samples. Source: Papineni, Roukos, Ward and Zhu, "BLEU: a method for automatic evaluation of machine translation";
the reference length is that of the COCO caption tool.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation.text_metrics.words import Ngram, ngrams, words

ORDERS = 4
STATISTICS = 2 * ORDERS + 2

Floats = NDArray[np.float64]


def bleu_statistics(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[n, 10] matched n-grams of orders 1..4, n-grams of orders 1..4, words, words of the closest reference.

    An n-gram matches at most as often as the one reference that holds it most often. Of two references equally
    close in length the shorter one counts. The sums of rows are what `bleu_of` reads.
    """
    out = np.zeros((len(references), STATISTICS))
    for i, (text, texts) in enumerate(zip(candidates, references, strict=True)):
        tokens = words(text)
        split = [words(reference) for reference in texts]
        most: Counter[Ngram] = Counter()
        for reference in split:
            most |= ngrams(reference, ORDERS)
        for gram, times in ngrams(tokens, ORDERS).items():
            out[i, len(gram) - 1] += min(times, most.get(gram, 0))
            out[i, ORDERS + len(gram) - 1] += times
        out[i, -2] = len(tokens)
        out[i, -1] = min((abs(len(r) - len(tokens)), len(r)) for r in split)[1]
    return out


def bleu_of(sums: Floats) -> Floats:
    """[..., 10] summed statistics -> [..., 4] BLEU-1 to BLEU-4 in 0..1; 0 where an order has no match."""
    matched, total = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    length, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(matched > 0, np.log(matched) - np.log(total), -np.inf)
        brevity = np.where(length < wanted, 1 - wanted / length, 0.0)
    means = np.cumsum(logs, axis=-1) / np.arange(1, ORDERS + 1)
    return np.exp(means + np.where(length > 0, brevity, -np.inf)[..., None])


def bleu(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> Floats:
    """[4] BLEU-1 to BLEU-4 of the corpus, 0..1."""
    return bleu_of(bleu_statistics(candidates, references).sum(0))
