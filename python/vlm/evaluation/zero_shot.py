"""Zero-shot classification: the class whose prompts lie nearest to the picture.

n pictures, C classes, P prompts, E embedding width. Sources: clip (templates, ensembling in embedding space),
siglip (sigmoid scores), filip and dclip (mean or greatest score over prompts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.classes import (
    ClassEntry,
    checked,
    classes_of_values,
    label_of,
    labelled_field,
    read_classes,
    true_classes,
)
from vlm.evaluation.controlled import MAIN, Controlled, Figures, controlled, ratio
from vlm.evaluation.material import Floats, Material, unit
from vlm.evaluation.ranking import TIE, Integers, first_places
from vlm.evaluation.result import Result, figures
from vlm.evaluation.table import OVER
from vlm.evaluation.task import Fields, Task, as_fields
from vlm.evaluation.thumbnail import thumbnails
from vlm.runtime.descriptors import (
    Control,
    Descriptors,
    controlled_table,
    described,
    descriptors_of,
    read_descriptors,
)
from vlm.runtime.embedder import Embedder
from vlm.runtime.prompt import LearnedPrompt, prompt_of

PLAIN = "{}"
Reduce = Literal["embedding-mean", "score-mean", "score-max"]
_SCORES = 2**24  # scores held at a time
_SHOWN = 5  # classes of one example
_MATRIX = 24  # classes of the confusion matrix that a report draws


class ZeroShotOptions(Task):
    """Classes by their names alone. Templates hold `{}` where the name goes."""

    task: Literal["zero-shot"] = "zero-shot"
    classes: str | None = Field(
        None, description="file of classes: a name a line, or JSON; FILE#LIST picks a list"
    )
    labels_from: Fields | None = Field(
        None,
        description="data field that holds a sample's class, or several: the first one that the data has",
    )
    templates: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description='prompts, for example "a photo of a {}."; default: the one that the model has learned, else the name alone',
    )
    reduce: Reduce | None = Field(
        None, description="how a class's prompts become one score; default: embedding-mean, of descriptors score-mean"
    )
    descriptors: Descriptors | None = Field(
        None, description="class -> what can be seen of it, a table or a JSON file: one prompt each, as in `crow, which has black feathers`"
    )
    controls: tuple[Control, ...] = Field(
        (), description="with descriptors, also measured: names (without any), random-words, other-class (those of another class)"
    )
    explain: int = Field(0, ge=0, description="with descriptors: best fitting ones of its answer that each example keeps")
    none_below: float | None = Field(
        None, ge=0, le=1, description='below this probability the answer is "none of these"'
    )

    @field_validator("templates")
    @classmethod
    def _one_place(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for template in value or ():
            if template.count("{}") != 1:
                raise ValueError(
                    f"template {template!r} must hold {{}} exactly once, where the class name goes"
                )
        return value

    @model_validator(mode="after")
    def _some_classes(self) -> ZeroShotOptions:
        if self.classes is None and self.labels_from is None:
            raise ValueError("zero-shot needs classes: a file (classes) or a data field (labels_from)")
        self.read_only_where(self.descriptors is not None, "there are descriptors", "controls", "explain")
        return self

    @property
    def reduction(self) -> Reduce:
        return self.reduce or ("embedding-mean" if self.descriptors is None else "score-mean")

    def tables(self, classes: Sequence[ClassEntry]) -> dict[str, dict[str, tuple[str, ...]] | None]:
        """Descriptors of the classes by arm, the task's own under ''; None: names alone. Raises DataError for a class without any."""
        if self.descriptors is None:
            return {MAIN: None}
        given = read_descriptors(self.descriptors)
        table = {entry.label: descriptors_of(given, entry.label, entry.names) for entry in classes}
        return {MAIN: table, **{name: controlled_table(table, name, self.seed) for name in self.controls}}

    def run(self, material: Material) -> Result:
        return zero_shot(material, self)


def prompts_of(
    classes: Sequence[ClassEntry],
    templates: Sequence[str] | None,
    *,
    learned: LearnedPrompt | None = None,
    table: Mapping[str, tuple[str, ...]] | None = None,
) -> tuple[list[str], Integers]:
    """Every class's prompts, templates x names x descriptors, and the class of each [P].

    learned: the model's own prompt, where there are no templates. table: descriptors. Raises DataError for a class without an
    entry there, RequestError for one that a prompt of each class does not have.
    """
    prompts, owner = [], []
    for number, entry in enumerate(classes):
        own = entry.templates or templates
        for template in own or (PLAIN,):
            for name in entry.names:
                text = learned.text(name, entry.label) if not own and learned is not None else template.replace("{}", name, 1)
                texts = [text] if table is None else described(text, descriptors_of(table, entry.label, entry.names))
                prompts += texts
                owner += [number] * len(texts)
    return prompts, np.array(owner, dtype=np.int64)


def class_scores(images: Floats, prompts: Floats, owner: Integers, reduce: Reduce) -> Floats:
    """[n, C] cosines, or means or maxima of cosines. images [n, E], prompts [P, E] unit rows, owner [P] ascending."""
    starts = np.flatnonzero(np.r_[True, owner[1:] != owner[:-1]])
    counts = np.diff(np.r_[starts, len(owner)]).astype(np.float32)
    if reduce == "embedding-mean":
        return images @ unit(np.add.reduceat(prompts, starts, axis=0) / counts[:, None], "class").T
    scores = images @ prompts.T
    if reduce == "score-mean":
        return np.add.reduceat(scores, starts, axis=1) / counts
    return np.maximum.reduceat(scores, starts, axis=1)


def explained(
    image: Floats, prompts: Floats, owner: Integers, texts: Sequence[str], chosen: int, count: int | None = None
) -> list[dict[str, Any]]:
    """The prompts of one class with their cosine to a picture [E], best first: what speaks for it. With `score-mean` the mean of
    all of them is the class's score."""
    own = np.flatnonzero(owner == chosen)
    cosines = prompts[own] @ image
    order = np.argsort(-cosines, kind="stable")[:count].tolist()
    return [{"text": texts[own[i]], "score": float(cosines[i])} for i in order]


@dataclass(frozen=True)
class Classified:
    """rank [n]: place of the true class from 1, 0 where the sample has none of the classes; answer [n]: the best
    class; confidence [n]: its probability (softmax over classes, or sigmoid, by the model's form)."""

    rank: Integers
    answer: Integers
    confidence: NDArray[np.float64]


def classify(
    images: Floats, prompts: Floats, owner: Integers, truth: Integers, reduce: Reduce, embedder: Embedder
) -> Classified:
    """Score and rank in blocks of pictures. A class that ties with the true one stands before it."""
    n = len(images)
    rank, answer, confidence = np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n)
    step = max(1, _SCORES // len(owner))
    for start in range(0, n, step):
        scores = class_scores(images[start : start + step], prompts, owner, reduce)
        true = truth[start : start + step]
        rows = np.arange(len(scores))
        best = scores.argmax(1)
        own = scores[rows, np.maximum(true, 0)]
        ahead = (scores >= own[:, None] - np.float32(TIE)).sum(
            1
        )  # the true class itself is counted: places from 1
        logits = embedder.scale * scores.astype(np.float64) + embedder.bias
        top = logits[rows, best]
        if embedder.form == "sigmoid":
            sure = 1 / (1 + np.exp(-np.clip(top, -700, 700)))
        else:
            sure = 1 / np.exp(logits - top[:, None]).sum(1)
        rank[start : start + step] = np.where(true >= 0, ahead, 0)
        answer[start : start + step], confidence[start : start + step] = best, sure
    return Classified(rank, answer, confidence)


def classes_and_truth(material: Material, options: ZeroShotOptions) -> tuple[list[ClassEntry], Integers, str]:
    """The classes, the true class of each sample (-1: none of them), and where that came from."""
    fields = [
        {"text": texts[0], "caption": texts[0], **f} if texts else f
        for texts, f in zip(material.texts, material.fields)
    ]
    field = None if options.labels_from is None else labelled_field(fields, as_fields(options.labels_from))
    if options.classes is not None:
        classes = read_classes(options.classes)
    else:
        assert field is not None
        values = [label for f in fields if (label := label_of(f.get(field))) is not None]
        classes = checked(classes_of_values(values), f"field {field!r}")
    truth, source = true_classes(classes, material.keys, fields, field)
    return classes, np.array(truth, dtype=np.int64), source


def zero_shot(material: Material, options: ZeroShotOptions) -> Result:
    """top1 and top5 over samples that belong to a class; refusals too when `none_below` is set.

    Raises DataError when the data and the classes have nothing in common.
    """
    assert material.images is not None
    classes, truth, source = classes_and_truth(material, options)
    learned, arms = prompt_of(material.embedder), {}
    for name, table in options.tables(classes).items():
        texts, belongs = prompts_of(classes, options.templates, learned=learned, table=table)
        shown = material.embed_texts(texts)
        ranked = classify(material.images, shown, belongs, truth, options.reduction, material.embedder)
        arms[name] = ranked.rank[truth >= 0]
        if name == MAIN:
            prompts, owner, rows, found = texts, belongs, shown, ranked
    inside = truth >= 0
    concepts = material.concepts()
    rank = found.rank[inside]
    estimate = bootstrap(
        np.stack([rank <= 1, rank <= 5], axis=1),
        clusters=[c for c, kept in zip(concepts, inside) if kept],
        resamples=options.resamples,
        seed=options.seed,
        share=True,
    )
    metrics, intervals = figures(("top1", "top5"), estimate, 100.0)
    share = [100 / len(classes), 100 * min(5, len(classes)) / len(classes)]
    chance = {"top1": round(share[0], 6), "top5": round(share[1], 6)}
    per_class = per_class_of(classes, truth, found.rank)
    metrics["mean_per_class"] = round(float(np.mean([row["top1"] for row in per_class])), 6)
    chance["mean_per_class"] = chance["top1"]
    most = max(row["samples"] for row in per_class)
    details: dict[str, Any] = {
        "classes": len(classes),
        "labels_from": source,
        "outside": int((~inside).sum()),
        "clusters": estimate.clusters,
        "most_frequent_class": round(100 * most / int(inside.sum()), 6),
        "per_class": per_class,
        "confused": confused_of(classes, truth, found.answer),
        "confusion": confusion_of(classes, truth, found.answer),
    }
    if options.descriptors is not None:
        counts = np.bincount(owner, minlength=len(classes))
        details["descriptors"] = {"texts": len(prompts), "fewest": int(counts.min()), "most": int(counts.max())}
        beside = _beside_controls(arms, [c for c, kept in zip(concepts, inside) if kept], options)
        metrics |= beside.metrics
        intervals |= beside.intervals
    if options.none_below is not None:
        extra = _refusals(found, truth, concepts, options)
        for part, values in zip((metrics, intervals), extra):
            part.update(values)
    return Result(
        task="zero-shot",
        name=options.title,
        samples=int(inside.sum()) if options.none_below is None else len(material),
        metrics=metrics,
        intervals=intervals,
        chance=chance,
        details=details,
        examples=_examples(material, classes, truth, found, (rows, owner), prompts, options)
        if options.examples
        else [],
    )


def _beside_controls(
    arms: Mapping[str, Integers], clusters: Sequence[Any], options: ZeroShotOptions
) -> Controlled:
    """Figures of each control, NAME/top1, and what the descriptors gain over it, over_NAME/top1, paired. arms: place of the true
    class of each sample, the descriptors' own under ''."""
    rows = {name: np.stack([rank <= 1, rank <= 5, np.ones_like(rank, bool)], axis=1).astype(float) for name, rank in arms.items()}
    top = Figures(("top1", "top5"), lambda sums: ratio(sums[..., :2], sums[..., 2:]), (100.0, 100.0), ((2,), (2,)))
    both = controlled(rows, top, clusters=clusters, resamples=options.resamples, seed=options.seed)
    names = [head for name in arms if name != MAIN for head in (name, OVER + name)]
    metrics, intervals = ({name: tree[name] for name in names} for tree in (both.metrics, both.intervals))
    return Controlled(metrics, intervals, both.clusters)


def _refusals(
    found: Classified, truth: Integers, concepts: list[Any], options: ZeroShotOptions
) -> tuple[dict[str, float], dict[str, Any]]:
    """coverage: share answered; accuracy_answered: of those, right; accuracy_with_none: all samples, where a sample
    of no class is right when refused; none_recall: share of those refused."""
    answered = found.confidence >= options.none_below  # type: ignore[operator]
    right = answered & (found.answer == truth) & (found.rank == 1)
    outside = truth < 0
    values: dict[str, float] = {}
    intervals: dict[str, Any] = {}
    parts = {
        "coverage": (answered, np.ones_like(answered)),
        "accuracy_answered": (right, answered),
        "accuracy_with_none": (right | (outside & ~answered), np.ones_like(answered)),
        "none_recall": (outside & ~answered, outside),
    }
    for name, (top, bottom) in parts.items():
        if bottom.any():
            e = bootstrap(
                top.astype(float), bottom.astype(float), clusters=concepts, resamples=options.resamples, seed=options.seed, share=True
            )  # fmt: skip
            value, interval = figures((name,), e, 100.0)
            values |= value
            intervals |= interval
    return values, intervals


def per_class_of(classes: Sequence[ClassEntry], truth: Integers, rank: Integers) -> list[dict[str, Any]]:
    inside = truth >= 0
    samples = np.bincount(truth[inside], minlength=len(classes))
    right = np.bincount(truth[inside], (rank[inside] == 1).astype(float), minlength=len(classes))
    return [
        {
            "class": classes[c].label,
            "samples": int(samples[c]),
            "top1": round(100 * float(right[c] / samples[c]), 6),
        }
        for c in np.flatnonzero(samples).tolist()
    ]


def confused_of(
    classes: Sequence[ClassEntry], truth: Integers, answer: Integers, count: int = 20
) -> list[dict[str, Any]]:
    """The most frequent (true, answered) pairs that differ; equally frequent ones by class number."""
    wrong = (truth >= 0) & (truth != answer)
    codes, times = np.unique(truth[wrong] * len(classes) + answer[wrong], return_counts=True)
    samples = np.bincount(truth[truth >= 0], minlength=len(classes))
    out = []
    for i in np.argsort(-times, kind="stable")[:count]:
        true, said = divmod(int(codes[i]), len(classes))
        part = {"true": classes[true].label, "answered": classes[said].label, "count": int(times[i])}
        out.append({**part, "share": round(float(times[i] / samples[true]), 6)})
    return out


def confusion_of(classes: Sequence[ClassEntry], truth: Integers, answer: Integers) -> dict[str, Any]:
    """counts[true][answered] over the most frequent classes; a last column gathers answers outside them."""
    samples = np.bincount(truth[truth >= 0], minlength=len(classes))
    shown = [c for c in np.argsort(-samples, kind="stable")[:_MATRIX].tolist() if samples[c]]
    place = np.full(len(classes), len(shown))
    place[shown] = np.arange(len(shown))
    counts = np.zeros((len(shown), len(shown) + 1), dtype=np.int64)
    rows = np.isin(truth, shown)
    np.add.at(counts, (place[truth[rows]], place[answer[rows]]), 1)
    everything = len(shown) == len(classes)
    return {
        "classes": [classes[c].label for c in shown],
        "names": [classes[c].names[0] for c in shown],
        "counts": (counts[:, :-1] if everything else counts).tolist(),
        "other": not everything,
    }


def _examples(
    material: Material,
    classes: Sequence[ClassEntry],
    truth: Integers,
    found: Classified,
    prompts: tuple[Floats, Integers],
    texts: Sequence[str],
    options: ZeroShotOptions,
) -> list[dict[str, Any]]:
    """The first samples of a seeded shuffle, whatever their outcome, with the classes they lie nearest to."""
    assert material.images is not None
    chosen = np.random.default_rng([options.seed, 2]).permutation(len(material))[: options.examples].tolist()
    small = thumbnails(material.pictures(chosen))
    scores = class_scores(material.images[chosen], *prompts, options.reduction)
    best = first_places(scores, _SHOWN)
    out = []
    for row, i in enumerate(chosen):
        answers = [
            {"text": classes[c].names[0], "score": float(scores[row, c]), "right": bool(truth[i] == c)}
            for c in best[row].tolist()
        ]
        out.append(
            {
                "direction": "zero-shot",
                "key": material.keys[i],
                "picture": small.get(i),
                "truth": [classes[truth[i]].names[0]] if truth[i] >= 0 else [],
                "rank": int(found.rank[i]),
                "confidence": float(found.confidence[i]),
                "found": answers,
            }
        )
        if options.explain:
            out[-1]["why"] = explained(material.images[i], *prompts, texts, int(best[row, 0]), options.explain)
    return out
