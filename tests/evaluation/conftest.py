"""A drawn embedder that a test can compute by hand: pictures carry a direction, texts name one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.material import BadTally, Material
from vlm.models import DualEncoderOptions, LanguageOptions, save_model
from vlm.types import VocabularyLayout


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


def write_model(directory, model, tokenizer):
    """A model directory as a run leaves it."""
    save_model(model, directory)
    tokenizer.save(directory)
    if model.preprocess() is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(model.preprocess().to_config()))


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train_bpe(
        ["a red circle above a blue square", "a small green star", "colour 0 1 2 3"] * 3, 300
    )


@pytest.fixture(scope="session")
def vocabulary(tokenizer):
    special = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id, "pad": tokenizer.pad_id}
    return VocabularyLayout.of_text(tokenizer.vocab_size, special)


@pytest.fixture(scope="session")
def tiny_dual(tokenizer, vocabulary, tmp_path_factory):
    """(model, tokenizer, its directory): a dual encoder with random weights."""
    torch.manual_seed(0)
    vision = {"width": 16, "depth": 1, "heads": 2, "image_size": 16, "patch_size": 8}
    options = DualEncoderOptions(
        embed_dim=16, vision=vision, text={"width": 16, "depth": 1, "heads": 2, "length": 16}
    )
    model = options.build(vocabulary)
    directory = tmp_path_factory.mktemp("dual")
    write_model(directory, model, tokenizer)
    return model, tokenizer, directory


@pytest.fixture(scope="session")
def tiny_language(tokenizer, vocabulary, tmp_path_factory):
    """(model, tokenizer, its directory): a language model with random weights."""
    torch.manual_seed(0)
    model = LanguageOptions(width=16, depth=1, heads=2, ffn_width=32, length=32).build(vocabulary)
    directory = tmp_path_factory.mktemp("language")
    write_model(directory, model, tokenizer)
    return model, tokenizer, directory


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
