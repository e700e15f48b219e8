"""int8 bundles: smaller, near to the float bundle, complete by themselves, refused where they stray."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest

from tests.answering_fixtures import answering_bundle
from tests.bundle_fixtures import exported
from vlm.cli.main import main
from vlm.config.errors import CheckpointError, GateFailed, RequestError
from vlm.export import quantise_bundle
from vlm.export.drawings import ODD_SIZES, drawn_picture
from vlm.export.parity import Check
from vlm.export.quantise import _require, compare_bundles
from vlm.runtime import open_any_bundle
from vlm.runtime.chat import Message
from vlm.runtime.generation import Decoding, generate
from vlm.runtime.manifest import verify_files

LOOSE = 0.9  # models of width 24 to 32: a level of 256 weighs more there than in one that is used


def bundle_dir(name):
    return exported(name)[0] if name in ("clip", "siglip", "language") else answering_bundle(name)[0]


@pytest.mark.parametrize("name", ["clip", "siglip", "language", "prefix", "cross", "drop", "tiles-apart"])
def test_a_bundle_of_every_kind_is_smaller_near_and_whole(name, tmp_path):
    source = bundle_dir(name)
    was = json.loads((source / "bundle.json").read_text())
    report = quantise_bundle(source, tmp_path / "small", least_cosine=LOOSE)
    assert report["bytes"] < report["bytes_before"]
    assert LOOSE <= report["least_cosine"] < 1
    about = json.loads((tmp_path / "small" / "bundle.json").read_text())
    assert about["quantised"]["graphs"] == report["graphs"]
    assert not any(n.startswith(("preprocess", "embed")) for n in report["graphs"])
    for part in report["graphs"]:
        path = tmp_path / "small" / about["graphs"][part]["path"]
        graph = onnx.load(path).graph
        kinds = [node.op_type for node in graph.node]
        constants = {initializer.name for initializer in graph.initializer}
        assert "MatMulInteger" in kinds
        left = [n for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in constants]
        assert left == [], "products of weights are all int8; those of attention have none"
        weights = [i for i in graph.initializer if i.data_type == onnx.TensorProto.INT8]
        assert max(abs(onnx.numpy_helper.to_array(w).astype(int)).max() for w in weights) <= 64  # 7 bits: no sum of bytes saturates
        assert path.stat().st_size < (source / was["graphs"][part]["path"]).stat().st_size
    small = open_any_bundle(tmp_path / "small")  # every digest is right
    verify_files(tmp_path / "small", small.manifest)
    small.self_test()
    assert "int8" in (tmp_path / "small" / "README.md").read_text()
    assert verify_files(source, open_any_bundle(source).manifest) is None, "the float bundle stays as it was"


def test_what_is_compared_is_what_both_say(tmp_path):
    quantise_bundle(bundle_dir("clip"), tmp_path / "small", least_cosine=LOOSE)
    before, after = open_any_bundle(bundle_dir("clip")), open_any_bundle(tmp_path / "small")
    checks, same = compare_bundles(before, after)
    assert same is None
    pictures = [drawn_picture(width, height, number) for number, (width, height) in enumerate(ODD_SIZES)]
    cosines = (before.encode_image(pictures) * after.encode_image(pictures)).sum(1)  # together: the scale is of a call
    assert [c.cosine for c in checks if c.part == "picture"] == pytest.approx(cosines.tolist(), abs=1e-6)
    assert {c.part for c in checks} == {"picture", "text"}
    assert all(c.cosine == pytest.approx(1) for c in compare_bundles(before, before)[0])
    golden = json.loads((tmp_path / "small" / "golden" / "golden.json").read_text())
    assert np.allclose(after.encode_text(golden["texts"]), golden["text_embeddings"], atol=1e-6)


def test_steps_with_another_best_token_are_counted(tmp_path):
    report = quantise_bundle(bundle_dir("prefix"), tmp_path / "small", least_cosine=LOOSE)
    assert 0.5 < report["same_token"] <= 1
    before = open_any_bundle(bundle_dir("prefix"))
    assert compare_bundles(before, before)[1] == 1
    small = open_any_bundle(tmp_path / "small")
    prompt = small.prompt([Message("user", ("a red circle",))], [])
    assert len(generate(small, [prompt], Decoding(max_new_tokens=5))[0].ids) > 0


def test_a_bundle_that_strays_is_not_written_and_the_exit_code_is_5(capsys, tmp_path):
    output = tmp_path / "small"
    assert main(["export", str(bundle_dir("clip")), "--quantize", "int8", "--least-cosine", "1", "--output", str(output)]) == 5
    err = capsys.readouterr().err
    assert "expected 1.0" in err
    assert "--least-cosine" in err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(GateFailed, match="nan"):
        _require([Check("text", "'x'", 1.0, 0.0), Check("text", "'y'", float("nan"), 0.0)], 0.5)


def test_a_run_or_a_bundle_is_given_on_the_command_line(capsys, tmp_path, clip_model):
    for given, name in ((clip_model, "run"), (bundle_dir("clip"), "bundle")):
        line = ["export", str(given), "--quantize", "int8", "--least-cosine", str(LOOSE), "--output", str(tmp_path / name), "--json"]
        assert main(line) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["output"] == str(tmp_path / name)
        assert report["bytes"] < report["bytes_before"]
    again = ["export", str(tmp_path / "bundle"), "--output", str(tmp_path / "x")]
    for more, said in (
        (["--quantize", "int8"], "has int8 weights already"),
        ([], "is a bundle already"),
        (["--quantize", "int8", "--name", "x"], "keeps its name"),
        (["--quantize", "int4"], "int4"),
    ):
        assert main([*again, *more]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    assert main(["export", str(bundle_dir("clip")), "--quantize", "int8", "--output", str(bundle_dir("clip"))]) == 2
    assert "overwrite the bundle" in capsys.readouterr().err
    open_any_bundle(bundle_dir("clip")).self_test()


def test_a_damaged_bundle_is_named(tmp_path):
    broken = shutil.copytree(bundle_dir("clip"), tmp_path / "broken")
    (broken / "onnx" / "text_model.onnx").write_bytes(b"no graph")
    with pytest.raises(CheckpointError, match=r"text_model\.onnx"):
        quantise_bundle(broken, tmp_path / "small")
    assert not (tmp_path / "small").exists()
    with pytest.raises(RequestError, match="overwrite"):
        quantise_bundle(broken, broken)
