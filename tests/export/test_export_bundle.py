"""Bundles: what they hold, that they equal the model, and that a wrong one is never published."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from tests.bundle_fixtures import exported
from vlm.config.errors import GateFailed, RequestError, RunFailed
from vlm.export import export_bundle
from vlm.export.drawings import drawn_picture
from vlm.export.parity import Check, Tolerance, check_part, compare, require
from vlm.export.publish import publishing
from vlm.models import load_model
from vlm.runtime import open_bundle
from vlm.types.export import ExportPart


@pytest.mark.parametrize("name", ["clip", "siglip", "language"])
def test_every_graph_equals_the_model_at_every_shape(name):
    _, report = exported(name)
    cases = {(c["part"], c["case"]) for c in report["parity"]}
    if name == "language":
        assert {("decoder.logits", f"batch {b}, length {n}") for b in (1, 2, 5) for n in (1, 7, 24)} <= cases
    else:
        lengths = (1, 7, 16) if name == "clip" else (16,)
        assert {("vision.embedding", f"batch {b}") for b in (1, 2, 5)} <= cases
        assert {("text.embedding", f"batch {b}, length {n}") for b in (1, 2, 5) for n in lengths} <= cases
        assert ("picture", "99 x 801") in cases
    assert report["least_cosine"] > 0.9999
    assert report["greatest_difference"] < 1e-5


def test_bundle_holds_all_that_it_needs(clip_bundle):
    about = json.loads((clip_bundle / "bundle.json").read_text())
    on_disk = {p.relative_to(clip_bundle).as_posix() for p in clip_bundle.rglob("*") if p.is_file()}
    assert set(about["files"]) == on_disk - {"bundle.json"}
    graphs = {"onnx/vision_model.onnx", "onnx/text_model.onnx", "onnx/preprocess.onnx"}
    assert graphs | {"tokenizer.json", "config.json", "README.md"} <= on_disk
    assert {"preprocessor_config.json", "example.py", "golden/golden.json"} <= on_disk
    assert about["schema"] == 1
    assert about["opset"] == 18
    assert about["embedding"]["form"] == "softmax"
    assert about["versions"]["torch"]
    assert clip_bundle.stat().st_mode & 0o777 == 0o755


def test_example_needs_neither_vlm_nor_torch(clip_bundle, language_bundle):
    for bundle in (clip_bundle, language_bundle):
        blocked = (
            "import sys, runpy\n"
            "class Block:\n"
            "    def find_spec(self, name, *rest):\n"
            "        if name.partition('.')[0] in ('torch', 'vlm', 'transformers', 'onnx'): raise ImportError(name)\n"
            "sys.meta_path.insert(0, Block())\n"
            f"sys.argv = [{str(bundle / 'example.py')!r}]\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()


def test_example_gives_the_runtime_s_cosines(clip_bundle):
    done = subprocess.run([sys.executable, clip_bundle / "example.py"], capture_output=True, text=True, timeout=60, check=True)
    lines = dict(line.split("  ", 1)[::-1] for line in done.stdout.strip().splitlines())
    bundle = open_bundle(clip_bundle)
    cosines = bundle.encode_image([clip_bundle / "golden/picture-0.png"]) @ bundle.encode_text(list(lines)).T
    assert np.allclose([float(v) for v in lines.values()], cosines[0], atol=1e-4)


def test_transformers_gives_the_bundle_s_embeddings_from_equal_pixels(clip_bundle, clip_model):
    from transformers import CLIPModel

    theirs = CLIPModel.from_pretrained(clip_model, local_files_only=True).eval()
    bundle = open_bundle(clip_bundle)
    pixels = [bundle.prepare_image(drawn_picture(70, 50, i)) for i in range(3)]
    with torch.no_grad():
        out = theirs.get_image_features(pixel_values=torch.from_numpy(np.stack(pixels)))
    rows = getattr(out, "pooler_output", out).numpy()
    cosine = (bundle.encode_pixels(pixels) * rows).sum(1) / np.linalg.norm(rows, axis=1)
    assert cosine.min() > 0.999999


class _ScatterMean(torch.nn.Module):
    """Averages rows by a dynamic index: exports without a word as a scatter that only keeps the last row."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixel_values):
        x = self.inner(pixel_values)
        index = torch.zeros(x.shape[1], dtype=torch.int64).expand(x.shape[0], -1)
        mean = torch.zeros_like(x[:, :1]).scatter_reduce(1, index, x, "mean", include_self=False)
        return x + mean


def test_a_graph_that_exports_silently_wrong_is_refused_and_the_old_bundle_stays(clip_model, tmp_path):
    model = load_model(clip_model)
    right = model.export_parts()["vision"]
    output = tmp_path / "bundle"
    output.mkdir()
    (output / "bundle.json").write_text("{}")
    wrong = {"vision": ExportPart(_ScatterMean(right.module), right.inputs, right.dynamic, right.outputs)}
    with pytest.raises(GateFailed, match=r"vision\.embedding differs from the model at batch"):
        export_bundle(model, clip_model, output, parts=wrong)
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    assert (output / "bundle.json").read_text() == "{}"


def test_a_part_that_torch_cannot_export_is_named(clip_model, tmp_path):
    class Branches(torch.nn.Module):
        def forward(self, pixel_values):
            return pixel_values * 2 if pixel_values.sum() > 0 else pixel_values

    part = ExportPart(Branches(), {"pixel_values": torch.rand(2, 3)}, {}, ["embedding"])
    with pytest.raises(RunFailed, match="could not export the vision graph"):
        export_bundle(load_model(clip_model), clip_model, tmp_path / "b", parts={"vision": part})
    assert not list(tmp_path.iterdir())


def test_output_that_is_no_bundle_is_left_alone(clip_model, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RequestError, match="holds no bundle"):
        export_bundle(load_model(clip_model), clip_model, tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="not a directory"):
        export_bundle(load_model(clip_model), clip_model, tmp_path / "file")
    with pytest.raises(RequestError, match="opset 12"):
        export_bundle(load_model(clip_model), clip_model, tmp_path / "new", opset=12)


def test_publishing_replaces_an_older_bundle_whole(tmp_path):
    output = tmp_path / "bundle"
    for text in ("first", "second"):
        with publishing(output) as folder:
            (folder / "bundle.json").write_text(text)
            (folder / text).write_text("")
    assert sorted(p.name for p in output.iterdir()) == ["bundle.json", "second"]
    with pytest.raises(ZeroDivisionError):
        _publish_and_fail(output)
    assert (output / "bundle.json").read_text() == "second"
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def _publish_and_fail(output):
    with publishing(output) as folder:
        (folder / "bundle.json").write_text("third")
        raise ZeroDivisionError


def test_nan_and_other_shapes_never_pass_the_gate():
    rows = np.ones((2, 4), np.float32)
    for other in (rows * np.nan, rows[:1], rows * 1.01):
        with pytest.raises(GateFailed):
            require([compare("vision", "batch 2", other, rows)], Tolerance())
    require([compare("vision", "batch 2", rows, rows), Check("picture", "1 x 1", 0.99991, 1.0)], Tolerance())


def test_check_part_runs_shapes_other_than_the_traced_one(clip_bundle, clip_model):
    part = load_model(clip_model).export_parts()["text"]
    checks = check_part("text", part, clip_bundle / "onnx/text_model.onnx", vocab_size=300, longest=16)
    assert len(checks) == 9
    other = {name: torch.nn.Parameter(p + 0.05) for name, p in part.module.named_parameters()}
    for name, parameter in part.module.named_parameters():
        parameter.data = other[name].data
    with pytest.raises(GateFailed, match="text.embedding"):
        require(check_part("text", part, clip_bundle / "onnx/text_model.onnx", vocab_size=300, longest=16), Tolerance())
