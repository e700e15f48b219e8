"""Measures of written text, as pure functions of strings: captions, short answers, named objects.

One tokeniser serves them all (`words`). Corpus figures are functions of summed statistics, so that resampling
samples needs no second look at the texts. NumPy only.
"""

from vlm.evaluation.text_metrics.answers import (
    YES_NO_COUNTED,
    YES_NO_FIGURES,
    calibration_error,
    exact,
    normalise_answer,
    said_yes,
    yes_no_of,
    yes_no_statistics,
)
from vlm.evaluation.text_metrics.bleu import bleu, bleu_of, bleu_statistics
from vlm.evaluation.text_metrics.cider import Cider, cider
from vlm.evaluation.text_metrics.objects import ObjectNames, absent_rate, hallucination_statistics
from vlm.evaluation.text_metrics.rouge import rouge_l
from vlm.evaluation.text_metrics.words import ngrams, words

__all__ = [
    "YES_NO_COUNTED",
    "YES_NO_FIGURES",
    "Cider",
    "ObjectNames",
    "absent_rate",
    "bleu",
    "bleu_of",
    "bleu_statistics",
    "calibration_error",
    "cider",
    "exact",
    "hallucination_statistics",
    "ngrams",
    "normalise_answer",
    "rouge_l",
    "said_yes",
    "words",
    "yes_no_of",
    "yes_no_statistics",
]
