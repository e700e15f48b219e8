"""Boxes as text: moved as the picture is, then divided by the side."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm.data.boxes import box_text, seen_box
from vlm.data.samples import BadSample
from vlm.runtime.preprocess import Preprocess


@pytest.mark.parametrize("resize", ["shortest", "squash", "pad"])
@pytest.mark.parametrize("shape", [(64, 64), (200, 100), (90, 160), (128, 96)])
@pytest.mark.parametrize("place", [(0.4, 0.4, 0.6, 0.6), (0.3, 0.5, 0.5, 0.7)])
def test_infmllm_a_box_follows_the_resizing(resize, shape, place):
    width, height = shape
    preprocess = Preprocess(64, resize, "bilinear")
    pixels = np.zeros((height, width, 3), np.uint8)
    x0, y0, x1, y1 = round(place[0] * width), round(place[1] * height), round(place[2] * width), round(place[3] * height)
    pixels[y0:y1, x0:x1] = 255
    seen = preprocess.to_array(Image.fromarray(pixels))[0] > 127
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    expected = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) / 64
    found = seen_box([x0 / width, y0 / height, x1 / width, y1 / height], width, height, preprocess)
    assert np.abs(np.array(found) - expected).max() <= 1.01 / 64


def test_infmllm_what_the_crop_cuts_is_clipped_or_gone():
    preprocess = Preprocess(10, "shortest")
    assert seen_box([0.0, 0.0, 0.2, 1.0], 20, 10, preprocess) is None
    assert seen_box([0.0, 0.0, 0.5, 1.0], 20, 10, preprocess) == (0.0, 0.0, 0.5, 1.0)
    assert seen_box([0.0, 0.0, 0.5, 1.0], 20, 10, Preprocess(10, "pad")) == pytest.approx((0.0, 0.3, 0.5, 0.8))


@pytest.mark.parametrize("box", [None, [0, 0, 1], [0.5, 0, 0.4, 1], [0, 0, 2, 1], "box", [0, 0, True, 1], [0, 0, float("nan"), 1]])
def test_what_is_no_box_is_refused(box):
    with pytest.raises(BadSample, match="bad_box"):
        seen_box(box, 10, 10, Preprocess(10))


def test_box_text():
    assert box_text((0.125, 0.5, 1.0, 0.0), 2) == "[0.12, 0.50, 1.00, 0.00]"
