"""Phrases against patches: which patches are right, what ties mean, and a reader of pixels that must find what is drawn."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm.config.errors import DataError, RequestError
from vlm.data.scenes.layout import COLORS
from vlm.evaluation import LocalisationOptions, evaluate
from vlm.evaluation.encoder import TorchEmbedder
from vlm.evaluation.localisation import beats, right_patches
from vlm.evaluation.table import table_of
from vlm.runtime.preprocess import Preprocess

SIDE = 16
NAMES = list(COLORS)


class Colours:
    """A patch is how much it holds of each named colour; a phrase is its colour. blind: every patch is alike."""

    name = "colours"
    scale, bias, form = 10.0, 0.0, "softmax"

    def __init__(self, blind=False):
        self.blind, self.preprocess = blind, Preprocess(64, "shortest")

    def encode_image(self, pictures):
        raise AssertionError("a pooled vector is not asked for")

    def encode_text(self, texts):
        return np.stack([np.eye(len(NAMES) + 1)[next(i for i, name in enumerate(NAMES) if name in text)] for text in texts])

    def encode_patches(self, pictures):
        out = []
        for picture in pictures:
            pixels = self.preprocess.to_array(picture).astype(np.float64).transpose(1, 2, 0)
            near = np.stack([np.abs(pixels - COLORS[name]).max(-1) < 12 for name in NAMES], -1).astype(np.float64)
            step = 64 // SIDE
            held = near.reshape(SIDE, step, SIDE, step, -1).sum((1, 3)).reshape(SIDE * SIDE, -1)
            rows = np.concatenate([held, np.full((SIDE * SIDE, 1), 0.5)], 1)
            rows = np.ones_like(rows) if self.blind else rows
            out.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
        return np.stack(out)


def look(model, uri="scenes:?n=40&objects=1&split=val", **options):
    return evaluate(model, [LocalisationOptions(resamples=100, **options)], uri)[0]


def test_the_patches_of_a_box_are_those_whose_middle_it_holds():
    inside, quadrant = right_patches((0.25, 0.0, 0.75, 0.3), 4)
    assert inside.reshape(4, 4).tolist() == [[False, True, True, False]] + [[False] * 4] * 3
    # The middle of the box is at x = 0.5: it belongs to the right half, and so do columns 2 and 3.
    assert quadrant.reshape(4, 4).tolist() == [[False, False, True, True]] * 2 + [[False] * 4] * 2


def test_a_box_smaller_than_a_patch_is_in_one_patch_and_one_at_the_edge_in_the_last():
    inside, _ = right_patches((0.02, 0.52, 0.04, 0.54), 4)
    assert inside.nonzero()[0].tolist() == [8]
    inside, _ = right_patches((1.0, 1.0, 1.0, 1.0), 4)
    assert inside.nonzero()[0].tolist() == [15]
    assert [part.tolist() for part in right_patches((0.1, 0.1, 0.2, 0.2), 1)] == [[True], [True]]


def test_a_wrong_patch_as_near_as_the_best_right_one_stands_before_it():
    right = np.array([True, False, False])
    assert beats(np.array([0.9, 0.8, 0.7]), right)
    assert not beats(np.array([0.9, 0.9, 0.7]), right)
    assert not beats(np.array([0.5, 0.8, 0.7]), right)
    assert beats(np.array([0.5, 0.5, 0.5]), np.ones(3, bool))


def test_dreamlip_a_reader_of_pixels_finds_drawn_objects():
    result = look(Colours(), examples=4)
    assert result.task == "localisation"
    assert result.samples == result.details["phrases"] == 40
    assert result.details["patches"] == 256
    # The middle of every shape but a ring and a cross of thin lines is filled with its colour.
    assert result.metrics["accuracy"] > 85
    assert 0 < result.chance["accuracy"] < 25
    assert result.chance["quadrant"] == 25
    bounds = result.intervals["accuracy"]
    assert bounds["lower"] <= result.metrics["accuracy"] <= bounds["upper"]
    assert result.details["best_fixed_patch"]["accuracy"] >= result.chance["accuracy"]
    assert "accuracy" in table_of(result)
    example = result.examples[0]
    assert example["question"].startswith("a ")
    assert example["picture"].startswith("data:image/webp")
    assert {e["right"] for e in result.examples} <= {True, False}


def test_patches_that_are_all_alike_find_nothing():
    result = look(Colours(blind=True))
    assert result.metrics == {"accuracy": 0, "quadrant": 0}


def test_only_objects_with_a_phrase_of_their_own_are_looked_for(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [
        '{"image": "a.png", "things": [{"c": "red", "at": [0, 0, 0.5, 0.5]}, {"c": "red", "at": [0.5, 0, 1, 1]}, {"c": "blue", "at": [0, 0, 1, 1]}]}',
        '{"image": "a.png"}',
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    result = look(Colours(), str(tmp_path / "x.jsonl"), column="things", phrase="{c}", box="at")
    assert result.details["phrases"] == result.samples == 1
    with pytest.raises(DataError, match="no object with a box"):
        look(Colours(), str(tmp_path / "x.jsonl"))
    (tmp_path / "x.jsonl").write_text('{"image": "a.png", "objects": [{"color": "red", "shape": "x", "box": [0, 0, 2, 2]}]}')
    with pytest.raises(DataError, match="not a box"):
        look(Colours(), str(tmp_path / "x.jsonl"))


def test_boxes_are_moved_as_the_picture_is_cropped(tmp_path):
    picture = Image.new("RGB", (64, 32), (255, 255, 255))
    picture.paste(COLORS["red"], (32, 8, 48, 24))
    picture.paste(COLORS["blue"], (0, 8, 12, 24))
    picture.save(tmp_path / "wide.png")
    objects = '[{"color": "red", "shape": "square", "box": [0.5, 0.25, 0.75, 0.75]}, {"color": "blue", "shape": "square", "box": [0, 0.25, 0.18, 0.75]}]'
    (tmp_path / "x.jsonl").write_text(f'{{"image": "wide.png", "objects": {objects}}}')
    result = look(Colours(), str(tmp_path / "x.jsonl"))
    assert result.details["phrases"] == 1  # the blue one is cropped away
    assert result.metrics["accuracy"] == 100


def test_dreamlip_a_dual_encoder_is_asked_for_the_tokens_that_training_groups(tiny_dual):
    model, tokenizer, _ = tiny_dual
    embedder = TorchEmbedder(model, tokenizer, model.preprocess(), batch=2)
    pictures = [Image.new("RGB", (16, 16), (40 * i, 10, 200)) for i in range(3)]
    patches = embedder.encode_patches(pictures)
    assert patches.shape == (3, 4, 16)
    np.testing.assert_allclose(np.linalg.norm(patches, axis=-1), 1, rtol=1e-5)
    result = evaluate(embedder, [LocalisationOptions(resamples=100)], "scenes:?n=8&size=16")[0]
    assert result.details["patches"] == 4
    assert 0 <= result.metrics["accuracy"] <= 100


def test_a_model_without_patches_is_refused():
    class Pooled:
        name, encode_image, encode_text = "pooled", Colours.encode_image, Colours.encode_text

    with pytest.raises(RequestError, match="embeds patches"):
        look(Pooled())
