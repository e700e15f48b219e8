"""Boxes as text: read, compared and counted; scenes whose boxes a reader of pixels must find; a trained sort of model and its bundle."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.answering_fixtures import bundle_of, torch_of
from tests.evaluation.colour_generator import EOS, IMAGE, PAD, ColourGenerator
from vlm.config.errors import DataError
from vlm.data.boxes import box_text, seen_box
from vlm.evaluation import GroundingOptions, evaluate
from vlm.evaluation.grounding import FIGURES, Wanted, grounding_statistics, iou, read_box
from vlm.evaluation.table import table_of

CHARACTERS = "[], .0123456789abcdefghijklmnopqrstuvwxyz?"


class Pixels(ColourGenerator):
    """Answers with the box of all pixels that are not as the corner; without a picture, and where `silent`, in words."""

    def __init__(self, silent=False):
        super().__init__()
        self.silent = silent
        self.vocabulary = ["", "", "", *CHARACTERS]
        self.vocab_size = len(self.vocabulary)
        assert (PAD, EOS, IMAGE) == (0, 1, 2)

    length = 200

    def encode(self, text):
        return [self.vocabulary.index(c) for c in text if c in CHARACTERS]

    def text(self, ids):
        return "".join(self.vocabulary[i] for i in ids)

    def prepare_image(self, picture, limits=None):
        return {"image": np.asarray(picture.convert("RGB"), dtype=np.float32).transpose(2, 0, 1)}

    def answer(self, prompt):
        if self.silent or not prompt.pictures:
            return self.encode("somewhere")
        pixels = prompt.pictures["image"][0]
        other = np.abs(pixels - pixels[:, :1, :1]).sum(0) > 60
        rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
        height, width = other.shape
        box = (columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height)
        return self.encode(box_text(box, 2))


def ask(uri, generator, **options):
    return evaluate(generator, [GroundingOptions(resamples=100, **options)], uri)[0]


def test_infmllm_the_boxes_of_drawn_scenes_are_where_the_pixels_are():
    result = ask("scenes:?n=40&objects=1&split=val", Pixels(), examples=4)
    assert result.samples == result.details["questions"] == 40
    assert result.metrics["accuracy"] == 100
    assert result.metrics["mean_iou"] > 80
    assert result.metrics["unread"] == result.details["unread"] == 0
    assert result.metrics["none"] == {"accuracy": 0, "mean_iou": 0, "unread": 100}
    assert result.metrics["shuffled"]["mean_iou"] < 50
    assert result.metrics["over_none"]["accuracy"] == 100
    assert 0 < result.chance["mean_iou"] < 60
    assert "unread" not in result.chance
    assert "accuracy" in table_of(result)
    example = result.examples[0]
    assert read_box(example["truth"][0]) is not None
    assert example["question"].startswith("where is the ")


def test_answers_without_a_box_are_counted():
    result = ask("scenes:?n=6&objects=1", Pixels(silent=True), controls=())
    assert result.metrics == {"accuracy": 0, "mean_iou": 0, "unread": 100}
    assert result.details["unread"] == 6


def test_every_object_or_one_of_a_picture_and_only_those_with_a_phrase_of_their_own(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    objects = [
        {"color": "red", "shape": "circle", "box": [0, 0, 0.5, 0.5]},
        {"color": "red", "shape": "square", "box": [0.5, 0, 1, 0.5]},
        {"color": "blue", "shape": "star", "box": [0, 0, 0.25, 0.25]},
        {"color": "blue", "shape": "star", "box": [0.5, 0.5, 1, 1]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"image": "a.png", "objects": objects[k:], "n": k}) + "\n" for k in range(2)))
    uri = str(tmp_path / "a.jsonl")
    assert ask(uri, Pixels(silent=True), controls=()).details["questions"] == 3
    assert ask(uri, Pixels(silent=True), controls=(), draw="one").details["questions"] == 2
    by_shape = ask(uri, Pixels(silent=True), controls=(), regions={"phrase": "{shape}"})
    assert by_shape.details["questions"] == 3


def test_wrong_boxes_are_named_by_their_sample(tmp_path):
    Image.new("RGB", (8, 4)).save(tmp_path / "a.png")
    for box, words in (([0, 0, 2, 1], "not a box"), ([0, 0, 1, 1], "no square")):
        line = {"image": "a.png", "objects": [{"color": "red", "shape": "star", "box": box}]}
        (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(DataError, match=words) as caught:
            ask(str(tmp_path / "a.jsonl"), Pixels(), controls=())
        assert caught.value.where == "a.jsonl:1"
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png"}) + "\n")
    with pytest.raises(DataError, match="no object with a box"):
        ask(str(tmp_path / "a.jsonl"), Pixels(), controls=())


READ = [
    ("[0.12, 0.34, 0.56, 0.78]", 1, (0.12, 0.34, 0.56, 0.78)),
    ("it is at (0,0.5,1,1).", 1, (0, 0.5, 1, 1)),
    ("0.1 0.2 0.3 0.4", 1, (0.1, 0.2, 0.3, 0.4)),
    ("[100, 200, 300, 400]", 1000, (0.1, 0.2, 0.3, 0.4)),
    ("[.1, .2, .3, .4, .5]", 1, (0.1, 0.2, 0.3, 0.4)),
    ("[100, 200, 300, 400]", 1, None),
    ("[0.5, 0.2, 0.3, 0.4]", 1, None),
    ("[0.1, 0.2, 0.1, 0.4]", 1, None),
    ("[-0.1, 0.2, 0.3, 0.4]", 1, None),
    ("[0.1, 0.2, 0.3]", 1, None),
    ("", 1, None),
    ("left", 1, None),
]


@pytest.mark.parametrize(("text", "scale", "box"), READ)
def test_what_is_read_as_a_box(text, scale, box):
    assert read_box(text, scale) == (None if box is None else pytest.approx(box))


def test_iou_by_hand_and_by_counting_pixels():
    assert iou((0, 0, 0.5, 0.5), (0, 0, 0.5, 0.5)) == 1
    assert iou((0, 0, 0.5, 1), (0.5, 0, 1, 1)) == 0
    assert iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0
    assert iou((0, 0, 1, 0.5), (0, 0.25, 1, 1)) == pytest.approx(0.25)
    draw = np.random.default_rng(0)
    for _ in range(20):
        edges = np.sort(draw.integers(0, 33, (2, 2, 2)), axis=-1)
        masks = np.zeros((2, 32, 32), bool)
        for mask, ((x0, x1), (y0, y1)) in zip(masks, edges):
            mask[y0:y1, x0:x1] = True
        a, b = ((x0 / 32, y0 / 32, x1 / 32, y1 / 32) for (x0, x1), (y0, y1) in edges)
        either = (masks[0] | masks[1]).sum()
        assert iou(a, b) == pytest.approx((masks[0] & masks[1]).sum() / either if either else 0)


def test_the_threshold_is_reached_not_passed():
    wanted = [Wanted(0, "", "", (0.0, 0.0, 1.0, 1.0))] * 3
    rows = grounding_statistics(wanted, [(0.0, 0.0, 1.0, 0.5), (0.0, 0.0, 1.0, 0.49), None], 0.5)
    assert rows[:, 0].tolist() == [1, 0, 0]
    assert FIGURES.of(rows.sum(0)).tolist() == pytest.approx([1 / 3, 0.99 / 3, 1 / 3])


def test_a_model_and_its_bundle_say_alike_how_they_crop():
    ours, theirs = bundle_of("prefix"), torch_of("prefix")
    assert (ours.framing.size, ours.framing.resize) == (theirs.framing.size, theirs.framing.resize)
    assert seen_box([0, 0, 0.5, 1], 80, 40, ours.framing) == seen_box([0, 0, 0.5, 1], 80, 40, theirs.framing)
    result, other = (ask("scenes:?n=3", model, controls=(), max_new_tokens=4) for model in (ours, theirs))
    assert result.metrics == other.metrics
    assert result.details["questions"] > 3
