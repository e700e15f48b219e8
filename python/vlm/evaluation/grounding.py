"""Where things are: boxes that a model writes as text, against the boxes of the data. Source: infmllm (RefCOCO's accuracy at IoU 0.5).

n samples, q objects asked for, S statistics of an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vlm.config.errors import DataError
from vlm.data.boxes import box_text, seen_box
from vlm.data.samples import BadSample, field_at
from vlm.data.streams.conversation import Box, regions_of
from vlm.data.streams.options import Regions
from vlm.evaluation.controlled import MAIN, Figures, controlled, put, ratio
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result
from vlm.evaluation.thumbnail import thumbnails
from vlm.evaluation.writing import Ask, WritingTask, arms_of, balanced, need, written
from vlm.runtime.preprocess import Preprocess

if TYPE_CHECKING:
    from PIL import Image

Floats = NDArray[np.float64]

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
_BOX = re.compile(rf"(?<![\d.])({_NUMBER})\s*[,;\s]\s*({_NUMBER})\s*[,;\s]\s*({_NUMBER})\s*[,;\s]\s*({_NUMBER})(?![\d.]*\d)")


class GroundingOptions(WritingTask):
    """Each object that its phrase alone names is asked for; the answer is read as [x0, y0, x1, y1] in shares of what the model sees.

    accuracy: percent with an IoU of at least `at`; mean_iou: percent; unread: percent without a box, which count as IoU 0.
    """

    task: Literal["grounding"] = "grounding"
    max_new_tokens: int = Field(32, ge=1, description="longest answer in tokens")
    regions: Regions = Field(Regions(), description="where objects and boxes are and how they are asked for, as in training")
    at: float = Field(0.5, gt=0, le=1, description="IoU from which a box is right")
    scale: float = Field(1.0, gt=0, description="what the model writes for the far side: 1, or 100, 999, 1000 of other models")
    draw: Literal["all", "one"] = Field("all", description="every object of a picture, or one drawn for each picture")

    def run(self, samples: Pictured, batch: int) -> Result:
        return grounding(samples, self, batch)


def read_box(text: str, scale: float = 1.0) -> Box | None:
    """The first four numbers in a row of a text as shares x0 < x1, y0 < y1 of 0..1; None when that is no such box."""
    found = _BOX.search(text)
    if found is None:
        return None
    x0, y0, x1, y1 = (float(number) / scale for number in found.groups())
    return (x0, y0, x1, y1) if 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1 else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1 with x0 <= x1, y0 <= y1; 0 where both are empty."""
    across = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    along = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    both = across * along
    either = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / either if either > 0 else 0.0


@dataclass(frozen=True)
class Wanted:
    """sample: its number; text: the question; phrase: the object; box: as the model sees it."""

    sample: int
    text: str
    phrase: str
    box: Box


def wanted_of(samples: Pictured, options: GroundingOptions) -> list[Wanted]:
    """All that is asked, in order. An object outside of what is seen, or whose phrase names another too, is not.

    Raises DataError for a field that holds no boxes, by the sample's key.
    """
    framing: Preprocess | None = getattr(samples.generator, "framing", None)
    out: list[Wanted] = []
    for number, fields in enumerate(samples.fields):
        entries = field_at(dict(fields), options.regions.column)
        if entries is None:
            continue
        picture: list[Image.Image] = []

        def seen(box: Any, number: int = number, picture: list[Image.Image] = picture) -> Box | None:
            if framing is not None and framing.resize == "squash":
                return seen_box(box, 1, 1, framing)
            if not picture:
                picture.append(samples.picture(number))
            width, height = picture[0].size
            if framing is None and width != height:
                raise BadSample("bad_box", "the model does not say how it crops a picture that is no square")
            return seen_box(box, width, height, framing or Preprocess(1, "squash"))

        try:
            found = regions_of(entries if isinstance(entries, list) else [entries], options.regions, seen)
        except BadSample as error:
            raise DataError(error.message, where=samples.keys[number]) from None
        found = [found[int(np.random.default_rng([options.seed, 11, number]).integers(len(found)))]] if (
            found and options.draw == "one"
        ) else found
        out += [Wanted(number, options.regions.prompt.replace("{phrase}", phrase), phrase, box) for phrase, box, _ in found]
    return out


def grounding_statistics(wanted: Sequence[Wanted], boxes: Sequence[Box | None], at: float) -> Floats:
    """[q, 4] right, IoU, unread, 1."""
    out = np.zeros((len(wanted), 4))
    for i, (want, box) in enumerate(zip(wanted, boxes, strict=True)):
        overlap = 0.0 if box is None else iou(box, want.box)
        out[i] = overlap >= at, overlap, box is None, 1
    return out


def _figures(sums: Floats) -> Floats:
    return np.stack([ratio(sums[..., k], sums[..., 3]) for k in range(3)], axis=-1)


FIGURES = Figures(("accuracy", "mean_iou", "unread"), _figures, (100.0,) * 3, ((3,), None, (3,)))


def grounding(samples: Pictured, options: GroundingOptions, batch: int) -> Result:
    """Intervals draw concepts (or samples) with all their objects. Raises DataError when there is nothing to ask for.

    chance: always the mean of all boxes.
    """
    regions = options.regions
    wanted = wanted_of(samples, options)
    need(
        len(wanted),
        f"no object with a box in {regions.column!r} ({regions.box!r}) that {regions.phrase!r} alone names",
        "name the fields in the preset: regions = { column, box, phrase }",
    )
    asks = [Ask(want.sample, want.text) for want in wanted]
    arms, permutes = arms_of(samples, options.controls, options.seed)
    answers = written(samples, asks, arms, options.settings(), batch)
    boxes = {arm: [read_box(text, options.scale) for text in texts] for arm, texts in answers.items()}
    statistics = {arm: grounding_statistics(wanted, own, options.at) for arm, own in boxes.items()}
    concepts = samples.concepts()
    clusters = [(0, c) if (c := concepts[want.sample]) is not None else (1, want.sample) for want in wanted]
    found = controlled(statistics, FIGURES, clusters=clusters, resamples=options.resamples, seed=options.seed)
    a, b, c, d = np.mean([want.box for want in wanted], axis=0).tolist()
    blind = grounding_statistics(wanted, [(a, b, c, d)] * len(wanted), options.at)
    chance: dict[str, Any] = {}
    for path, value in zip(FIGURES.paths[:2], FIGURES.of(blind.sum(0)).tolist()):
        put(chance, path, round(100 * value, 6))
    main = statistics[MAIN]
    details: dict[str, Any] = {
        "questions": len(wanted),
        "at": options.at,
        "unread": int(main[:, 2].sum()),
        "clusters": found.clusters,
    }
    if "shuffled" in arms:
        details["shuffled"] = "permutation" if permutes else "drawn with replacement: one concept has over half"
    return Result(
        task="grounding",
        name=options.title,
        samples=len({want.sample for want in wanted}),
        metrics=found.metrics,
        intervals=found.intervals,
        chance=chance,
        details=details,
        examples=_examples(samples, wanted, answers, main, options),
    )


def _examples(
    samples: Pictured,
    wanted: Sequence[Wanted],
    answers: Mapping[str, list[str]],
    statistics: Floats,
    options: GroundingOptions,
) -> list[dict[str, Any]]:
    """As many right as wrong, in turns, each the first of a seeded shuffle."""
    right = statistics[:, 0] > 0
    chosen = balanced(right, options.examples, options.seed)
    small = thumbnails(samples.pictures(wanted[i].sample for i in chosen))
    return [
        {
            "direction": "grounding",
            "key": samples.keys[wanted[i].sample],
            "picture": small.get(wanted[i].sample),
            "question": wanted[i].text,
            "answer": answers[MAIN][i],
            "truth": [box_text(wanted[i].box, options.regions.decimals)],
            "iou": round(float(statistics[i, 1]), 4),
            "right": bool(right[i]),
            "controls": {arm: texts[i] for arm, texts in answers.items() if arm},
        }
        for i in chosen
    ]
