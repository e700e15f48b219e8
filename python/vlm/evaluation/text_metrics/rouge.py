"""ROUGE-L: the longest common subsequence of words.

n samples. Source: Lin, "ROUGE: a package for automatic evaluation of summaries"; beta and the maximum over
references are those of the COCO caption tool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation.text_metrics.words import words

BETA = 1.2


def common_length(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(
    candidates: Sequence[str], references: Sequence[Sequence[str]], beta: float = BETA
) -> NDArray[np.float64]:
    """[n] F of precision and recall, 0..1, each the best over the references; their mean is the corpus score."""
    out = np.zeros(len(references))
    for i, (text, texts) in enumerate(zip(candidates, references, strict=True)):
        tokens = words(text)
        split = [reference for reference in map(words, texts) if reference]
        if not tokens or not split:
            continue
        common = [common_length(tokens, reference) for reference in split]
        precision = max(common) / len(tokens)
        recall = max(c / len(reference) for c, reference in zip(common, split))
        if common and precision > 0:
            out[i] = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return out
