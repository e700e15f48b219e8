"""Tiny models and their bundles, made once for all the tests that need them."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch

from vlm.data.tokenizer import Tokenizer
from vlm.export import export_bundle
from vlm.models import DualEncoderOptions, LanguageOptions, load_model
from vlm.models.directory import save_model
from vlm.runtime.preprocess import Preprocess
from vlm.types import VocabularyLayout

TEXTS = ["a red circle on a blue square", "a photo of two small green triangles", "ein gelber Stern über dem Haus"]
_VISION = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "heads": 2}
_TEXT = {"width": 32, "depth": 2, "heads": 2, "length": 16}
OPTIONS = {
    "clip": DualEncoderOptions(embed_dim=24, vision=_VISION, text=_TEXT),
    "siglip": DualEncoderOptions(
        embed_dim=32,
        bias=-10.0,
        project_vision=False,
        vision=_VISION | {"depth": 1, "pool": "attention", "class_token": False, "pre_norm": False, "patch_bias": True},
        text=_TEXT | {"depth": 1, "pool": "last", "attention": "bidirectional", "mask_padding": False, "projection_bias": True},
        pictures={"resize": "squash", "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
    ),
    "language": LanguageOptions(width=32, depth=1, heads=2, ffn_width=64, length=24),
}


@functools.cache
def root() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="vlm-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS * 4, 320, max_length=16)


@functools.cache
def model_directory(name: str) -> Path:
    """A directory as training leaves it: RUN/model with weights, tokenizer and preprocessing."""
    tokens = tokenizer()
    vocabulary = VocabularyLayout.of_text(tokens.vocab_size, {"pad": tokens.pad_id, "bos": tokens.bos_id, "eos": tokens.eos_id})
    torch.manual_seed(1)
    model = OPTIONS[name].build(vocabulary)
    with torch.no_grad():  # so that no two directions of the output are alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    directory = root() / name / "model"
    save_model(model, directory)
    tokens.save(directory)
    if name != "language":
        pictures = OPTIONS[name].pictures
        preprocess = Preprocess(32, pictures.resize, pictures.interpolation, pictures.mean, pictures.std)
        (directory / "preprocessor_config.json").write_text(json.dumps(preprocess.to_config()))
    return directory


@functools.cache
def exported(name: str) -> tuple[Path, dict]:
    directory = model_directory(name)
    output = root() / f"{name}-bundle"
    return output, export_bundle(load_model(directory), directory, output)


@pytest.fixture(scope="session")
def clip_model() -> Path:
    return model_directory("clip")


@pytest.fixture(scope="session")
def clip_bundle() -> Path:
    return exported("clip")[0]


@pytest.fixture(scope="session")
def siglip_bundle() -> Path:
    return exported("siglip")[0]


@pytest.fixture(scope="session")
def language_bundle() -> Path:
    return exported("language")[0]
