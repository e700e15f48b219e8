"""Tiny models that read pictures and answer, and their bundles, made once for all the tests that need them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.bundle_fixtures import TEXTS, exported, root
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation.generator import TorchGenerator, open_generator
from vlm.export import export_bundle
from vlm.export.drawings import drawn_picture
from vlm.models import VisionLanguageOptions, load_model
from vlm.models.directory import save_model
from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message
from vlm.types import VocabularyLayout

_TOWER = dict(width=16, depth=2, heads=2, image_size=16, patch_size=8)
_FINE = _TOWER | {"image_size": 32}  # 16 patches
_LANGUAGE = dict(width=24, depth=2, heads=4, kv_heads=2, ffn_width=32, length=160)
KINDS: dict[str, dict[str, Any]] = {
    "prefix": dict(template="chatml"),
    "cross": dict(
        fusion={"kind": "cross-attention", "every": 1},
        towers={"main": _TOWER, "fine": _TOWER | {"image_size": 24, "patch_size": 12, "layer": -2, "norm": False}},
    ),
    "drop": dict(tokens={"keep": {"kind": "stages", "layers": [1, 2], "ratios": [0.5, 0.25]}}, language=_LANGUAGE | {"depth": 3}),
    "tiles": dict(tiler={"max_tiles": 3, "before": "<I>", "after": "</I>"}, language=_LANGUAGE | {"length": 400}, length=400),
    "tiles-beside": dict(
        tiler={"max_tiles": 3}, fusion={"kind": "cross-attention", "every": 1}, language=_LANGUAGE | {"length": 400}, length=400
    ),
    "tiles-apart": dict(
        tiler={"max_tiles": 3, "before": "<I>", "after": "</I>"},
        fusion={"kind": "hybrid", "every": 1},
        language=_LANGUAGE | {"length": 400},
        length=400,
    ),
    "drop-keep": dict(
        tokens={"keep": {"kind": "stages", "layers": [2], "ratios": [0.3]}, "apply": {"positions": "keep"}},
        language=_LANGUAGE | {"depth": 3},
    ),
    "aim": dict(
        towers={"main": _FINE},
        tokens={
            "pre": [{"select": {"kind": "bipartite", "keep": 0.5}, "apply": {"kind": "merge"}}],
            "score": {"kind": "pagerank"},
            "apply": {"positions": "keep"},
            "keep": {"kind": "linear", "start": 1, "step": 0.375},
        },
        language=_LANGUAGE | {"depth": 3},
    ),
    "fopru": dict(
        towers={"main": _FINE},
        tokens={
            "pre": [{"score": {"kind": "attention-received"}, "select": {"kind": "rows", "ratio": 0.7}}],
            "score": {"kind": "attention-from-rows", "norm": "previous-layer"},
            "keep": {"kind": "sigmoid", "k": 1.0, "budget": 0.6},
        },
        language=_LANGUAGE | {"depth": 3},
    ),
    "tome": dict(
        towers={"main": _FINE | {"merge": {"remove": {"kind": "constant", "r": 3}, "when": "inference"}}},
        tokens={"score": {"kind": "uniform"}, "keep": {"kind": "constant", "ratio": 0.5}, "when": "inference"},
    ),
}


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS * 4, 320, ["<image>", "<|im_start|>", "<|im_end|>"])


@functools.cache
def answering_model(kind: str) -> Path:
    """A directory as training leaves it: RUN/model with weights and tokenizer."""
    tokens = tokenizer()
    special = {"pad": tokens.pad_id, "bos": tokens.bos_id, "eos": tokens.eos_id, "image": tokens.token_to_id("<image>")}
    table = dict(towers={"main": _TOWER}, connector={"kind": "linear", "dropout": 0.0}, language=_LANGUAGE, length=160)
    torch.manual_seed(1)
    model = VisionLanguageOptions.model_validate(table | KINDS[kind]).build(VocabularyLayout.of_text(tokens.vocab_size, special))
    with torch.no_grad():  # so that answers vary, gates are open and two logits are seldom alike
        for parameter in model.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    directory = root() / f"answer-{kind}" / "model"
    save_model(model, directory)
    tokens.save(directory)
    return directory


@functools.cache
def answering_bundle(kind: str) -> tuple[Path, dict]:
    directory = answering_model(kind)
    output = root() / f"answer-{kind}-bundle"
    return output, export_bundle(load_model(directory), directory, output)


@functools.cache
def bundle_of(kind: str) -> Any:
    path = exported("language")[0] if kind == "language" else answering_bundle(kind)[0]
    return open_any_bundle(path, threads=1)


@functools.cache
def torch_of(kind: str) -> TorchGenerator:
    from tests.bundle_fixtures import model_directory

    directory = model_directory("language") if kind == "language" else answering_model(kind)
    return open_generator(load_model(directory).eval(), Tokenizer.load(directory), name=kind)


def random_prompts(
    ours: Any, theirs: TorchGenerator, count: int, seed: int = 0, *, pictures: bool = True, same_pixels: bool = False
) -> tuple[list[Any], list[Any]]:
    """The same random conversations as prompts of a bundle and of torch: ragged texts, 0 to 2 pictures of odd sizes.

    same_pixels: torch reads the bundle's own, where a level of 255 could decide which positions are dropped.
    """
    random = np.random.default_rng(seed)
    words = " ".join(TEXTS).split()
    mine, yours = [], []
    for number in range(count):
        text = " ".join(random.choice(words, random.integers(1, 6 if pictures else 3)))
        drawn = [drawn_picture(*random.integers(3, 90, 2).tolist(), 7 * number + i) for i in range(number % 3 if pictures else 0)]
        shown = [ours.prepare_image(p) for p in drawn]
        other = [as_data(theirs, p) for p in shown] if same_pixels else [theirs.prepare_image(p) for p in drawn]
        mine.append(ours.prompt([Message("user", (text,))], shown))
        yours.append(theirs.prompt([Message("user", (text,))], other))
    return mine, yours


def as_data(theirs: TorchGenerator, prepared: Any) -> dict[str, np.ndarray]:
    """Normalised pixels as the data of a torch model, 0..1."""
    made = {}
    for stream, preprocess in theirs.model.preprocesses().items():
        mean, std = (np.asarray(v, np.float32)[:, None, None] for v in (preprocess.mean, preprocess.std))
        made[stream] = prepared[stream] * std + mean
    return made


def golden_of(bundle: Path) -> dict[str, Any]:
    return json.loads((bundle / "golden/golden.json").read_text())


@pytest.fixture(scope="session")
def prefix_bundle() -> Path:
    return answering_bundle("prefix")[0]


@pytest.fixture(scope="session")
def prefix_model() -> Path:
    return answering_model("prefix")
