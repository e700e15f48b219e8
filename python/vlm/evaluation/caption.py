"""Captions: what a model writes about pictures, against what people (or a drawing program) wrote.

n samples, S statistics of a sample. Sources: limber (shuffled control); CIDEr-D, BLEU, ROUGE-L: `text_metrics`.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vlm.config.errors import RunFailed
from vlm.evaluation.controlled import MAIN, Figures, controlled, ratio
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result
from vlm.evaluation.task import Fields, as_fields
from vlm.evaluation.text_metrics import Cider, bleu_of, bleu_statistics, exact, rouge_l
from vlm.evaluation.thumbnail import thumbnails
from vlm.evaluation.writing import (
    Ask,
    Integers,
    WritingTask,
    arms_of,
    balanced,
    batches,
    need,
    prompts_of,
    texts_at,
    written,
)

Floats = NDArray[np.float64]

_SCORES = 13
"""Statistics of a caption: CIDEr, ROUGE-L, ten of BLEU, and 1."""
_LIKELIHOODS = 4
"""Statistics of a reference: nats, tokens, bits, characters."""


class CaptionOptions(WritingTask):
    """CIDEr-D (0..10), BLEU-1, BLEU-4 and ROUGE-L (0..100), and the cross-entropy of a reference.

    CIDEr and BLEU are figures of a corpus: their intervals draw samples again while document frequencies stay those
    of the evaluated references.
    """

    task: Literal["caption"] = "caption"
    prompt: str = Field("Describe the picture.", min_length=1, description="what the user says to each picture")
    references: Fields | None = Field(
        None, description="field with one or several captions, or several fields; default: the text column"
    )
    likelihood: bool = Field(
        True, description="also the cross-entropy of each first reference, where the model can score texts"
    )

    def run(self, samples: Pictured, batch: int) -> Result:
        return caption(samples, self, batch)


def references_of(samples: Pictured, options: CaptionOptions) -> list[tuple[str, ...]]:
    """Each sample's references; () for one that has none."""
    if options.references is None:
        return list(samples.texts)
    return [texts_at(fields, as_fields(options.references)) for fields in samples.fields]


def caption_statistics(cider: Cider, candidates: list[str], references: list[tuple[str, ...]]) -> Floats:
    """[n, 13] of each sample: CIDEr, ROUGE-L, the ten of BLEU, 1. Their sums are what `caption_figures` reads."""
    ones = np.ones(len(candidates))
    parts = [cider.scores(candidates), rouge_l(candidates, references)]
    return np.column_stack([*parts, bleu_statistics(candidates, references), ones])


def caption_figures(likelihood: bool) -> Figures:
    """The figures of a caption task, with those of the references' likelihood or without."""

    def of(sums: Floats) -> Floats:
        count = sums[..., _SCORES - 1]
        bleu = bleu_of(sums[..., 2 : _SCORES - 1])
        out = [sums[..., 0] / count, bleu[..., 0], bleu[..., 3], sums[..., 1] / count]
        if likelihood:
            nats, tokens, bits, characters = (sums[..., _SCORES + k] for k in range(_LIKELIHOODS))
            out += [ratio(nats, tokens), ratio(bits, characters)]
        return np.stack(out, axis=-1)

    paths: tuple[str, ...] = ("cider", "bleu_1", "bleu_4", "rouge_l")
    scale: tuple[float, ...] = (1.0, 100.0, 100.0, 100.0)
    if likelihood:
        paths += ("nats_per_token", "bits_per_character")
        scale += (1.0, 1.0)
    return Figures(paths, of, scale, (None,) * len(paths))


def likelihood_statistics(
    samples: Pictured, asks: list[Ask], shown: Integers | None, references: list[str], batch: int
) -> Floats:
    """[n, 4] nats, tokens, bits and characters of each reference after its prompt, the token that ends it included.

    Raises RunFailed for numbers that are not finite.
    """
    score: Any = samples.generator
    out = np.zeros((len(asks), _LIKELIHOODS))
    for part in batches(len(asks), batch):
        prompts = prompts_of(samples, [asks[i] for i in part], shown)
        for i, nats in zip(part, score.nats(prompts, [references[i] for i in part]), strict=True):
            total = float(np.asarray(nats, np.float64).sum())
            if not math.isfinite(total):
                raise RunFailed(
                    "the model gives probabilities that are not finite",
                    remedy="its weights are unusable: check the training loss, or evaluate an earlier checkpoint",
                )
            out[i] = total, len(nats), total / math.log(2), len(references[i])
        samples.said(part.stop, "references scored")
    return out


def caption(samples: Pictured, options: CaptionOptions, batch: int) -> Result:
    """Raises DataError when no sample has a reference.

    chance: the same measures of one caption for all, the most frequent reference.
    """
    references = references_of(samples, options)
    kept = [i for i, own in enumerate(references) if own]
    need(len(kept), "no reference caption", "name the field with: --text-from FIELD, or references in the preset")
    truth = [references[i] for i in kept]
    asks = [Ask(i, options.prompt) for i in kept]
    arms, permutes = arms_of(samples, options.controls, options.seed)
    answers = written(samples, asks, arms, options.settings(), batch)
    likelihood = options.likelihood and hasattr(samples.generator, "nats")
    cider = Cider(truth)
    statistics = {}
    for arm, shown in arms.items():
        rows = caption_statistics(cider, answers[arm], truth)
        if likelihood:
            firsts = [texts[0] for texts in truth]
            rows = np.concatenate([rows, likelihood_statistics(samples, asks, shown, firsts, batch)], axis=1)
        statistics[arm] = rows
    concepts = samples.concepts()
    found = controlled(
        statistics,
        caption_figures(likelihood),
        clusters=[concepts[i] for i in kept],
        resamples=options.resamples,
        seed=options.seed,
    )
    constant, guessed = _constant(cider, truth)
    details: dict[str, Any] = {
        "prompt": options.prompt,
        "references": sum(map(len, truth)),
        "without_reference": len(samples) - len(kept),
        "clusters": found.clusters,
        "distinct": len(set(answers[MAIN])),
        "empty": sum(not text for text in answers[MAIN]),
        "constant": constant,
        "document_frequencies": "of the evaluated references, fixed in resampling",
    }
    if "shuffled" in arms:
        details["shuffled"] = "permutation" if permutes else "drawn with replacement: one concept has over half"
    return Result(
        task="caption",
        name=options.title,
        samples=len(kept),
        metrics=found.metrics,
        intervals=found.intervals,
        chance=guessed,
        details=details,
        examples=_examples(samples, kept, truth, answers, statistics[MAIN][:, 0], options),
    )


def _constant(cider: Cider, truth: list[tuple[str, ...]]) -> tuple[str, dict[str, float]]:
    """The most frequent reference (of equal ones the first), and its measures as everyone's caption."""
    text = Counter(text for texts in truth for text in texts).most_common(1)[0][0]
    figures = caption_figures(False)
    sums = caption_statistics(cider, [text] * len(truth), truth).sum(0)
    values = zip(figures.paths, figures.of(sums).tolist(), figures.scale)
    return text, {path: round(value * scale, 6) for path, value, scale in values}


def _examples(
    samples: Pictured,
    kept: list[int],
    truth: list[tuple[str, ...]],
    answers: dict[str, list[str]],
    scores: Floats,
    options: CaptionOptions,
) -> list[dict[str, Any]]:
    """As many from the better half by CIDEr as from the worse, in turns, each the first of a seeded shuffle."""
    good = np.zeros(len(scores), dtype=bool)
    good[np.argsort(-scores, kind="stable")[: (len(scores) + 1) // 2]] = True
    chosen = balanced(good, options.examples, options.seed)
    small = thumbnails(samples.pictures(kept[i] for i in chosen))
    return [
        {
            "direction": "caption",
            "key": samples.keys[kept[i]],
            "picture": small.get(kept[i]),
            "question": options.prompt,
            "answer": answers[MAIN][i],
            "truth": list(truth[i]),
            "right": exact(answers[MAIN][i], truth[i]),
            "half": "better" if good[i] else "worse",
            "cider": round(float(scores[i]), 4),
            "controls": {arm: texts[i] for arm, texts in answers.items() if arm},
        }
        for i in chosen
    ]
