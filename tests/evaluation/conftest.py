"""A drawn embedder that a test can compute by hand: pictures carry a direction, texts name one."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlm.evaluation.material import BadTally, Material


class TableEmbedder:
    """Texts and pictures by look-up; the picture of number i is i pixels wide."""

    name = "table"
    scale, bias, form = 10.0, 0.0, "softmax"

    def __init__(self, texts, images):
        self.texts = texts
        self.images = images
        self.asked = []

    def encode_text(self, texts):
        self.asked.extend(texts)
        return np.stack([np.asarray(self.texts[text], dtype=np.float32) for text in texts])

    def encode_image(self, pictures):
        return np.stack([np.asarray(self.images[p.width - 1], dtype=np.float32) for p in pictures])


@pytest.fixture
def material():
    def make(images, texts, fields=None, table=None, **kwargs):
        images = np.asarray(images, dtype=np.float32)
        embedder = TableEmbedder(table or {}, images)
        rows = images / np.linalg.norm(images, axis=1, keepdims=True)
        return Material(
            embedder=embedder,
            keys=[f"k{i}" for i in range(len(images))],
            texts=[(t,) if isinstance(t, str) else tuple(t) for t in texts],
            fields=fields or [{} for _ in images],
            images=rows,
            fingerprint="0" * 64,
            bad=BadTally(),
            **kwargs,
        )

    return make


@pytest.fixture
def drawn():
    """A picture that TableEmbedder knows as number i."""
    return lambda i: Image.new("RGB", (i + 1, 4), (i % 256, 0, 0))
