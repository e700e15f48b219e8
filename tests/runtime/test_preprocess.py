"""Preprocessing: the pixels are those of the Hugging Face processor that the saved fields describe."""

from __future__ import annotations

import json
import resource

import numpy as np
import pytest
from PIL import Image

from vlm.config.errors import DataError
from vlm.runtime.preprocess import CLIP_MEAN, CLIP_STD, HALF, Preprocess

CASES = [
    Preprocess(32),
    Preprocess(33, "shortest", "bilinear"),
    Preprocess(32, "squash", "bicubic", HALF, HALF),
    Preprocess(24, "squash", "bilinear", CLIP_MEAN, CLIP_STD),
    Preprocess(33, "pad", "bilinear", HALF, HALF),
]
SIZES = [(64, 48), (48, 64), (32, 32), (33, 33), (99, 17), (7, 5), (31, 200), (90, 2)]


def picture(size, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("preprocess", CASES, ids=lambda p: f"{p.resize}-{p.interpolation}-{p.size}")
def test_transformers_gives_the_same_pixel_values_from_the_saved_fields(preprocess, tmp_path):
    from transformers import AutoImageProcessor

    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocess.to_config()))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    for size in SIZES:
        if preprocess.resize == "pad" and min(size) * preprocess.size < max(size):
            continue  # a side of less than one pixel: the Hugging Face processor fails on it
        shown = picture(size)
        theirs = np.asarray(processor(shown)["pixel_values"][0])
        ours = preprocess.normalise(preprocess.to_array(shown))
        assert ours.shape == (3, preprocess.size, preprocess.size)
        assert np.abs(ours - theirs).max() <= 1e-6
    assert Preprocess.from_config(processor.to_dict()) == preprocess


def test_fields_survive_a_round_trip():
    for preprocess in CASES:
        assert Preprocess.from_config(json.loads(json.dumps(preprocess.to_config()))) == preprocess


def test_published_clip_and_siglip_fields_are_read():
    clip = {
        "crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD), "resample": 3, "size": 224,
    }  # fmt: skip
    assert Preprocess.from_config(clip) == Preprocess(224)
    siglip = {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor", "processor_class": "SiglipProcessor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"height": 224, "width": 224},
    }  # fmt: skip
    assert Preprocess.from_config(siglip) == Preprocess(224, "squash", "bicubic", HALF, HALF)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": False}, "do_normalize"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor"),
        ({"resample": 0}, "resample"),
        ({"size": {"shortest_edge": 256}}, "crop_size"),
        ({"size": {"height": 32, "width": 64}}, "size"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"do_pad": True}, "do_pad"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order"),
        ({"image_processor_type": "LlavaNextImageProcessor"}, "image_processor_type"),
    ],
)
def test_fields_that_cannot_be_honoured_are_named(change, field):
    with pytest.raises(DataError, match=field):
        Preprocess.from_config(
            {**Preprocess(32).to_config(), **change}, where="model/preprocessor_config.json"
        )


def test_a_picture_of_the_right_size_is_left_as_it_is():
    shown = picture((32, 32))
    assert np.array_equal(Preprocess(32).to_array(shown), np.asarray(shown).transpose(2, 0, 1))


def test_an_extreme_aspect_ratio_costs_little_memory():
    strip = Image.new("RGB", (65_000, 2), (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = Preprocess(224).to_array(strip)
    assert (pixels == np.array([10, 200, 30], np.uint8)[:, None, None]).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def test_cropping_while_resizing_equals_resizing_then_cropping(monkeypatch):
    shown = Image.linear_gradient("L").resize((300, 40)).convert("RGB")
    expected = Preprocess(32).to_array(shown).astype(int)
    monkeypatch.setattr("vlm.runtime.preprocess._LARGEST_INTERMEDIATE", 1)
    assert np.abs(Preprocess(32).to_array(shown).astype(int) - expected).max() <= 1
