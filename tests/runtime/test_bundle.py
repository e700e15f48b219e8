"""The runtime: bundles without torch, checked when they are opened."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.bundle_fixtures import TEXTS, model_directory, tokenizer
from vlm.config.errors import CheckpointError, DataError, GateFailed
from vlm.export.drawings import drawn_picture
from vlm.models import load_model
from vlm.runtime import (
    Embedder,
    PreparingEmbedder,
    is_bundle,
    open_any_bundle,
    open_bundle,
    probabilities,
    scores,
)
from vlm.runtime.pictures import BadPicture
from vlm.runtime.preprocess import Preprocess


@pytest.fixture
def copy(clip_bundle, tmp_path):
    return Path(shutil.copytree(clip_bundle, tmp_path / "copy"))


def rewrite(bundle: Path, change) -> None:
    about = json.loads((bundle / "bundle.json").read_text())
    change(about)
    (bundle / "bundle.json").write_text(json.dumps(about))


def test_runtime_never_imports_torch(clip_bundle, language_bundle):
    script = f"""
import sys
class Block:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
from vlm.runtime import open_any_bundle
import numpy as np
bundle = open_any_bundle({str(clip_bundle)!r})
print(bundle.self_test())
print(open_any_bundle({str(language_bundle)!r}).self_test())
assert not any(name.partition(".")[0] in ("torch", "pydantic", "vlm.types") for name in sys.modules), "heavy import"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    cosine, difference = (float(line) for line in done.stdout.split())
    assert cosine > 0.999999
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_bundle_embeds_as_the_torch_model_does(name, request):
    bundle = open_bundle(request.getfixturevalue(f"{name}_bundle"))
    directory = model_directory(name)
    parts = load_model(directory).eval().export_parts()
    preprocess = Preprocess.from_config(json.loads((directory / "preprocessor_config.json").read_text()))
    pictures = [drawn_picture(w, h, w) for w, h in ((40, 90), (121, 33), (32, 32), (300, 200))]
    pixels = preprocess.normalise(np.stack([preprocess.to_array(p) for p in pictures]))
    ids, mask = tokenizer().encode(TEXTS, 16)
    with torch.no_grad():
        images = parts["vision"].module(torch.from_numpy(pixels)).numpy()
        texts = parts["text"].module(torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))).numpy()
    for ours, theirs in ((bundle.encode_image(pictures), images), (bundle.encode_text(TEXTS), texts)):
        assert ours.dtype == np.float32
        assert np.allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
        assert ((ours * theirs).sum(1) / np.linalg.norm(theirs, axis=1)).min() > 0.99999


def test_bundle_is_an_embedder_that_prepares(clip_bundle):
    bundle = open_bundle(clip_bundle)
    assert isinstance(bundle, Embedder)
    assert isinstance(bundle, PreparingEmbedder)
    assert is_bundle(clip_bundle)
    assert bundle.name == "clip"


def test_token_ids_are_those_of_training(clip_bundle, siglip_bundle):
    texts = [*TEXTS, "", "long " * 40, "naïve 你好 🙂\t x", " leading"]
    ids, mask = tokenizer().encode(texts, 16)
    fixed_ids, fixed_mask = open_bundle(siglip_bundle).tokenizer(texts)
    assert np.array_equal(fixed_ids, ids)
    assert np.array_equal(fixed_mask.astype(bool), mask)
    rows = open_bundle(clip_bundle).tokenizer.rows(texts)
    assert rows == [row[valid].tolist() for row, valid in zip(ids, mask)]


def test_rows_do_not_depend_on_batch_or_neighbours(clip_bundle):
    texts = [*TEXTS, "x", "long " * 40] * 3
    whole = open_bundle(clip_bundle, batch_size=64)
    small = open_bundle(clip_bundle, batch_size=2, threads=1)
    assert np.abs(whole.encode_text(texts) - small.encode_text(texts)).max() < 1e-5
    pictures = [drawn_picture(20 + i, 50, i) for i in range(5)]
    assert np.abs(whole.encode_image(pictures) - small.encode_image(pictures)).max() < 1e-5
    assert whole.encode_text([]).shape == whole.encode_image([]).shape == (0, 24)


def test_pictures_come_as_bytes_paths_or_pillow(clip_bundle):
    bundle = open_bundle(clip_bundle)
    path = clip_bundle / "golden/picture-0.png"
    from PIL import Image

    rows = bundle.encode_image([path, str(path), path.read_bytes(), Image.open(path), Image.open(path).convert("RGBA")])
    assert np.abs(rows - rows[0]).max() < 1e-6
    with pytest.raises(BadPicture, match="not_a_picture"):
        bundle.encode_image([b"<html>"])


def test_scores_and_probabilities(clip_bundle, siglip_bundle):
    for path, form in ((clip_bundle, "softmax"), (siglip_bundle, "sigmoid")):
        bundle = open_bundle(path)
        picture = drawn_picture(50, 50, 1)
        values = bundle.score([picture], TEXTS)
        cosine = bundle.encode_image([picture]) @ bundle.encode_text(TEXTS).T
        assert np.allclose(values, bundle.scale * cosine + bundle.bias, atol=1e-5)
        assert np.allclose(values, scores(bundle, bundle.encode_image([picture]), bundle.encode_text(TEXTS)))
        assert bundle.form == form
        chances = probabilities(values, bundle.form)
        expected = np.exp(values) / np.exp(values).sum() if form == "softmax" else 1 / (1 + np.exp(-values))
        assert np.allclose(chances, expected, rtol=1e-4)
    assert np.isfinite(probabilities(np.array([[1e4, -1e4]]), "softmax")).all()
    assert np.isfinite(probabilities(np.array([[1e4, -1e4]]), "sigmoid")).all()


def test_lone_surrogates_are_refused(clip_bundle):
    with pytest.raises(DataError, match="lone surrogate"):
        open_bundle(clip_bundle).encode_text(["a", "\ud800"])


def test_language_bundle_scores_tokens_as_torch_does(language_bundle):
    bundle = open_any_bundle(language_bundle)
    rows = bundle.tokenize(TEXTS)
    length = max(map(len, rows))
    ids = np.zeros((len(rows), length), np.int64)
    segment = np.full((len(rows), length), -1)
    for i, row in enumerate(rows):
        ids[i, : len(row)], segment[i, : len(row)] = row, 0
    scored = (segment >= 0) & (np.roll(segment, -1, 1) >= 0)
    scored[:, -1] = False
    got = bundle.nats(ids, segment, scored)
    with torch.no_grad():
        logits = load_model(model_directory("language")).eval().export_parts()["decoder"].module(torch.from_numpy(ids))
    wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.from_numpy(ids[:, 1:]).flatten(), reduction="none")
    assert np.allclose(got, wanted.numpy()[scored[:, :-1].ravel()], atol=1e-4)
    assert bundle.vocab_size == logits.shape[-1]
    with pytest.raises(ValueError, match="one document a row"):
        bundle.nats(ids, segment + 2, scored)
    with pytest.raises(CheckpointError, match="embeds no pictures"):
        open_bundle(language_bundle)


@pytest.mark.parametrize("name", ["onnx/vision_model.onnx", "tokenizer.json", "golden/picture-0.png", "README.md"])
def test_an_altered_file_is_named(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(CheckpointError, match="was altered") as caught:
        open_bundle(copy)
    assert caught.value.where == str(copy / name)


def test_a_missing_or_cut_file_is_named(copy):
    (copy / "onnx/text_model.onnx").write_bytes((copy / "onnx/text_model.onnx").read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="bytes, bundle.json says"):
        open_bundle(copy)
    (copy / "onnx/text_model.onnx").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        open_bundle(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "link/secret", "..\\secret"])
def test_names_outside_the_bundle_are_refused(copy, name):
    secret = copy.parent / "secret"
    secret.write_text("x")
    (copy / "link").symlink_to(copy.parent)
    entry = {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}
    rewrite(copy, lambda about: about["files"].update({name: entry}))
    with pytest.raises(CheckpointError, match="outside the bundle"):
        open_bundle(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(schema=2), "schema 2, expected 1"),
        (lambda a: a.update(kind="other"), "kind 'other' is not known"),
        (lambda a: a.pop("graphs"), "graphs and files"),
        (lambda a: a["graphs"].pop("text"), "graph 'text' is missing"),
        (lambda a: a["graphs"]["text"].update(path="onnx/other.onnx"), "not among the listed files"),
        (lambda a: a["embedding"].update(width="24"), r"embedding\.width"),
        (lambda a: a["embedding"].update(form="linear"), "form is 'linear'"),
        (lambda a: a.update(text=[]), r"text\.length"),
    ],
)
def test_a_wrong_manifest_gives_one_clear_error(copy, change, message):
    rewrite(copy, change)
    with pytest.raises(CheckpointError, match=message):
        open_any_bundle(copy)


def test_a_manifest_that_is_no_json_or_too_large_is_refused(copy):
    for text in (b"{", b"[1]", b"[" * 100_000, b'{"a": "' + b"x" * (5 << 20) + b'"}'):
        (copy / "bundle.json").write_bytes(text)
        with pytest.raises(CheckpointError, match=r"bundle\.json"):
            open_bundle(copy)
    with pytest.raises(CheckpointError, match="not a bundle"):
        open_bundle(copy.parent)


def test_a_graph_that_is_none_is_refused(copy):
    path = copy / "onnx/vision_model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match="onnxruntime cannot open"):
        open_bundle(copy, verify=False)


def test_self_test_notices_other_weights(copy, siglip_bundle):
    golden = json.loads((copy / "golden/golden.json").read_text())
    golden["text_embeddings"][0] = golden["text_embeddings"][1]
    (copy / "golden/golden.json").write_text(json.dumps(golden))
    assert open_bundle(siglip_bundle).self_test() > 0.99999
    with pytest.raises(GateFailed, match="golden vectors"):
        open_bundle(copy, verify=False).self_test()
