"""Classification by a model's own head: figures, classes, and models that have none."""

import numpy as np
import pytest
import torch

from vlm.config.errors import DataError, RequestError
from vlm.data.sources.uri import open_source
from vlm.evaluation import LinearProbeOptions, RetrievalOptions, evaluate, evaluate_in_memory, numbers_of
from vlm.evaluation.classification import ClassificationTaskOptions
from vlm.models import VisionOptions
from vlm.models.swin import SwinOptions
from vlm.types import VocabularyLayout

DATA = "scenes:?n=24&split=val"
SHAPES = ("arrow", "circle", "cross", "diamond", "ring", "square", "star", "triangle")


class Painter:
    """A classifier that knows the answers of the data, but takes every star for a ring."""

    name = "painter"

    def __init__(self, classes=SHAPES):
        source = open_source(DATA)
        self.answers = iter([source.read(i).fields["shape"] for i in range(len(source))])
        self.classes = classes

    def classify(self, pictures):
        out = np.zeros((len(pictures), len(self.classes)), np.float32)
        for row in range(len(pictures)):
            shape = next(self.answers)
            said = "ring" if shape == "star" else shape
            if said in self.classes:
                out[row, self.classes.index(said)] = 5.0
            out[row] -= 0.25  # never a row of zeros
        return out


def task(**options):
    return ClassificationTaskOptions(labels_from="shape", **options)


def test_top1_and_classes_by_hand():
    shapes = [open_source(DATA).read(i).fields["shape"] for i in range(24)]
    (result,) = evaluate(Painter(), [task()], DATA)
    stars = shapes.count("star")
    assert 0 < stars < 24
    assert result.metrics["top1"] == pytest.approx(100 * (24 - stars) / 24, abs=1e-5)
    per_class = {row["class"]: (row["samples"], row["top1"]) for row in result.details["per_class"]}
    assert per_class["star"] == (stars, 0.0)
    assert all(top1 == 100.0 for name, (_, top1) in per_class.items() if name != "star")
    assert result.details["confused"] == [{"true": "star", "answered": "ring", "count": stars, "share": 1.0}]
    assert result.chance["top1"] == 12.5
    assert numbers_of([result])["eval/classification/top1"] == result.metrics["top1"]


def test_samples_of_other_classes_are_left_out_and_counted():
    shapes = [open_source(DATA).read(i).fields["shape"] for i in range(24)]
    (result,) = evaluate(Painter(tuple(s for s in SHAPES if s != "circle")), [task()], DATA)
    assert result.details["outside"] == shapes.count("circle")
    assert result.samples == 24 - shapes.count("circle")
    with pytest.raises(DataError, match="holds no class"):
        evaluate(Painter(("cat", "dog")), [task()], DATA)


def model_of(classes):
    torch.manual_seed(0)
    tower = SwinOptions(image_size=32, width=12, depths=(1, 1), heads=(2, 2), window=4)
    return VisionOptions(tower=tower, classes=classes).build(VocabularyLayout({}, {}))


def test_a_model_of_pictures_alone_is_classified_and_probed_but_not_asked_for_texts():
    model = model_of(SHAPES)
    with_head = evaluate_in_memory(model, None, [task(), LinearProbeOptions(labels_from="shape", folds=2, penalties=(0.1,))], DATA)
    assert [result.task for result in with_head] == ["classification", "linear-probe"]
    with pytest.raises(RequestError, match="reads no texts"):
        evaluate_in_memory(model, None, [RetrievalOptions()], DATA)
    with pytest.raises(RequestError, match="classes of its own"):
        evaluate_in_memory(model_of(()), None, [task()], DATA)
