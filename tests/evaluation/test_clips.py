"""Clips before the models of an evaluation: frames are read together, and refused by models of single pictures."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.models.model_makers import VOCABULARY, batch_of, shaken
from vlm.config.errors import RequestError
from vlm.data import open_source
from vlm.evaluation.classification import ClassificationTaskOptions
from vlm.evaluation.clips import prepared, stream_of
from vlm.evaluation.reading import EvaluationData
from vlm.evaluation.seeing import TorchVision
from vlm.evaluation.session import evaluate
from vlm.models import VisionOptions
from vlm.runtime.film import film_strip, frames_of, is_clip
from vlm.runtime.preprocess import Preprocess
from vlm.types import Pictures

URI = "clips:?n=12&size=16&frames=3&split=val"
DIRECTIONS = ["down", "left", "right", "up"]


def seeing(kind="video", frames=3):
    tower = dict(kind=kind, width=12, depth=2, heads=2, image_size=16, patch_size=8)
    if kind == "video":
        tower |= {"frames": frames}
    torch.manual_seed(0)
    options = VisionOptions.model_validate({"tower": tower, "classes": DIRECTIONS})
    model = shaken(options.build(VOCABULARY), 0.3)
    return TorchVision(model, model.preprocess(), batch=5)


@torch.no_grad()
def test_logits_are_those_of_the_frames_read_together():
    own, source = seeing(), open_source(URI)
    strips = [source.read(i).fields["image"] for i in range(12)]
    got = own.classify(strips)
    assert got.shape == (12, 4)
    for strip, row in zip(strips[:3], got):
        pixels = np.stack([own.preprocess.to_array(f) for f in frames_of(strip, 3)])
        stream = Pictures(torch.from_numpy(pixels), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64))
        alone = own.model.encode(batch_of(1, image=stream), {"image": frozenset({"logits"})})["image"].logits[0]
        assert np.allclose(row, alone.numpy(), atol=1e-5)
    assert own.encode_image([strips[0], frames_of(strips[0], 3)[0]]).shape == (2, 12)  # a picture is a clip of one frame


def test_a_model_of_single_pictures_refuses_clips():
    strip = film_strip([Image.new("RGB", (16, 16))] * 2)
    with pytest.raises(RequestError, match="one picture a sample"):
        seeing("vit").classify([strip])
    assert prepared(strip, Preprocess(8), 5).shape == (2, 3, 8, 8)
    assert prepared(strip, Preprocess(8), 1).shape == (1, 3, 8, 8)
    pictures = stream_of([np.zeros((3, 4, 4), np.uint8)] * 2)
    assert pictures.slot is None
    assert pictures.sample_index.tolist() == [0, 1]


def test_clips_are_scored_as_pictures_are():
    result = evaluate(seeing(), [ClassificationTaskOptions(labels_from="direction", resamples=100)], URI)[0]
    assert result.samples == 12
    assert result.chance["top1"] == 25
    assert 0 <= result.metrics["top1"] <= 100


def test_a_list_of_files_is_read_as_a_clip(tmp_path):
    for k in range(3):
        Image.new("RGB", (8, 8), (60 * k, 0, 0)).save(tmp_path / f"{k}.png")
    (tmp_path / "c.jsonl").write_text(json.dumps({"image": ["2.png", "0.png", "1.png"], "caption": "red"}))
    item = next(iter(EvaluationData(str(tmp_path / "c.jsonl")).items()))
    picture = item.picture()
    assert is_clip(picture)
    assert [f.getpixel((0, 0))[0] for f in frames_of(picture, 8)] == [120, 0, 60]
