"""The preprocessing graph against Pillow, as training uses it."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from vlm.export.drawings import ODD_SIZES, drawn_picture
from vlm.export.preprocess_graph import preprocess_graph
from vlm.runtime.preprocess import Preprocess

SIZES = (*ODD_SIZES, (32, 33), (33, 32), (31, 32), (65, 63), (63, 65), (128, 129), (5, 400), (400, 7), (256, 256), (999, 16),
         (48, 100), (101, 49), (200, 134))  # fmt: skip


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", ["shortest", "squash", "pad"])
def test_graph_equals_pillow_to_one_level_on_thirty_odd_sizes(resize, interpolation):
    assert len(SIZES) == 30
    preprocess = Preprocess(32, resize, interpolation)
    session = _session(preprocess)
    std = np.asarray(preprocess.std)[:, None, None] * 255
    differing = 0.0
    for seed, (width, height) in enumerate(SIZES):
        for picture in (drawn_picture(width, height, seed), _noise(width, height, seed)):
            wanted = preprocess.normalise(preprocess.to_array(picture))
            levels = np.abs((_run(session, picture) - wanted) * std)
            assert levels.max() < 1.01, (width, height)
            differing += float((levels > 0.5).mean()) / (2 * len(SIZES))
    assert differing < 0.005


def test_pictures_longer_than_the_bound_keep_their_middle():
    preprocess = Preprocess(16)
    session = _session(preprocess)
    for size in ((20_000, 2), (2, 20_000)):
        array = np.zeros((size[1], size[0], 3), np.uint8)
        middle = [slice(n // 2 - 2, n // 2 + 2) if n > 2 else slice(None) for n in (size[1], size[0])]
        array[tuple(middle)] = 255
        pixels = _run(session, Image.fromarray(array))
        assert pixels.shape == (3, 16, 16)
        assert (pixels > 1.5).all()  # only the white middle is left


def test_a_picture_of_the_right_size_passes_unchanged():
    preprocess = Preprocess(32, "shortest", "bicubic", (0, 0, 0), (1, 1, 1))
    picture = _noise(32, 32, 3)
    pixels = _run(_session(preprocess), picture)
    assert np.array_equal(np.rint(pixels * 255).astype(np.uint8), np.asarray(picture).transpose(2, 0, 1))


def _session(preprocess: Preprocess) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(preprocess_graph(preprocess).SerializeToString(), providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, picture: Image.Image) -> np.ndarray:
    return session.run(["pixel_values"], {"picture": np.asarray(picture)})[0]


def _noise(width: int, height: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8))
