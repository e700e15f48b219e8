"""Classification by the model's own head: the class with the greatest logit. n samples, K classes of the model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from vlm.config.errors import DataError
from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.classes import LABEL_FIELDS, ClassEntry, label_of, labelled_field
from vlm.evaluation.material import Material
from vlm.evaluation.result import Result, figures
from vlm.evaluation.task import Fields, Needs, Task, as_fields
from vlm.evaluation.zero_shot import confused_of, confusion_of, per_class_of
from vlm.runtime.prompt import plain_name


class ClassificationTaskOptions(Task):
    """Percent of the samples of the model's classes that its head names rightly, in all and class by class."""

    task: Literal["classification"] = "classification"
    labels_from: Fields | None = Field(None, description="data field with a sample's class, or several: the first that the data has")
    needs: ClassVar[Needs] = "classifier"

    def run(self, material: Material) -> Result:
        return classification(material, self)


class LogitsOf:
    """A classifier as what `collect` asks for vectors: a picture's vector is its logits."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.classes: tuple[str, ...] = tuple(model.classes)

    def encode_image(self, pictures: Any) -> Any:
        """[n, K] float32"""
        return self.model.classify(pictures)


def classification(material: Material, options: ClassificationTaskOptions) -> Result:
    """top1 and top5 with intervals by concept. material.images: logits [n, K].

    Samples of a class that the model has not are counted and left out. Raises DataError when none is left.
    """
    assert material.images is not None
    names: tuple[str, ...] = material.embedder.classes  # type: ignore[attr-defined]
    field = labelled_field(material.fields, LABEL_FIELDS if options.labels_from is None else as_fields(options.labels_from))
    number = {name: i for i, name in enumerate(names)}
    labels = [label_of(fields.get(field)) for fields in material.fields]
    truth = np.array([-1 if label is None else number.get(label, -1) for label in labels], np.int64)
    inside = truth >= 0
    if not inside.any():
        raise DataError(
            f"field {field!r} holds no class of the model",
            remedy=f"classes of the model: {', '.join(names[:10])}; name the field: labels_from",
        )
    logits = material.images
    own = logits[np.arange(len(truth)), np.maximum(truth, 0)]
    rank = np.where(inside, (logits >= own[:, None]).sum(1), 0)  # what ties with the true class stands before it
    answer = logits.argmax(1).astype(np.int64)
    entries = [ClassEntry(name, (plain_name(name),)) for name in names]
    estimate = bootstrap(
        np.stack([rank[inside] <= 1, rank[inside] <= 5], axis=1),
        clusters=[c for c, kept in zip(material.concepts(), inside) if kept],
        resamples=options.resamples,
        seed=options.seed,
        share=True,
    )
    metrics, intervals = figures(("top1", "top5"), estimate, 100.0)
    per_class = per_class_of(entries, truth, rank)
    metrics["mean_per_class"] = round(float(np.mean([row["top1"] for row in per_class])), 6)
    chance = {"top1": round(100 / len(names), 6), "top5": round(100 * min(5, len(names)) / len(names), 6)}
    chance["mean_per_class"] = chance["top1"]
    details: dict[str, Any] = {
        "classes": len(names),
        "labels_from": field,
        "outside": int((~inside).sum()),
        "clusters": estimate.clusters,
        "most_frequent_class": round(100 * max(row["samples"] for row in per_class) / int(inside.sum()), 6),
        "per_class": per_class,
        "confused": confused_of(entries, truth, answer),
        "confusion": confusion_of(entries, truth, answer),
    }
    return Result("classification", options.title, int(inside.sum()), metrics, intervals, chance, details)
