"""`vlm embed`: lines in, JSON lines out, in order; bad inputs are lines too."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest

from vlm.cli.main import main
from vlm.export.drawings import drawn_picture
from vlm.runtime import open_bundle


@pytest.fixture
def folder(tmp_path):
    for i, size in enumerate(((40, 30), (9, 70), (64, 64))):
        drawn_picture(*size, i).save(tmp_path / f"picture {i} ü.png")
    (tmp_path / "page.png").write_text("<html>")
    return tmp_path


def run(monkeypatch, capsys, args, stdin=b""):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, [json.loads(line) for line in out.splitlines()], err


def test_pictures_from_stdin_in_order_with_bad_ones_as_lines(monkeypatch, capsys, clip_bundle, folder):
    good = sorted(folder.glob("picture*.png"))
    paths = [str(good[2]), str(folder / "page.png"), "", "/no/such.png", str(good[0]), str(good[1])]
    code, lines, err = run(monkeypatch, capsys, ["embed", clip_bundle, "--images", "-", "--batch-size", 2], "\n".join(paths).encode())
    assert code == 3
    assert "3 of 6" in err
    assert [line["input"] for line in lines] == paths
    assert ["error" in line for line in lines] == [False, True, True, True, False, False]
    assert "not_a_picture" in lines[1]["error"]
    wanted = open_bundle(clip_bundle).encode_image([good[2], good[0], good[1]])
    assert np.array_equal(np.array([line["embedding"] for line in lines if "embedding" in line], np.float32), wanted)


def test_directory_picture_list_and_null_separated_input(monkeypatch, capsys, clip_bundle, folder):
    (folder / "page.png").unlink()
    good = [str(p) for p in sorted(folder.glob("*.png"))]
    code, lines, _ = run(monkeypatch, capsys, ["embed", clip_bundle, "--images", folder])
    assert code == 0
    assert [line["input"] for line in lines] == good
    assert [line["input"] for line in run(monkeypatch, capsys, ["embed", clip_bundle, "--images", good[1]])[1]] == [good[1]]
    (folder / "list.txt").write_text("\r\n".join(good))
    assert run(monkeypatch, capsys, ["embed", clip_bundle, "--images", folder / "list.txt"])[1] == lines
    assert run(monkeypatch, capsys, ["embed", clip_bundle, "--images", "-", "-0"], "\0".join(good).encode() + b"\0")[1] == lines


def test_a_mark_at_the_start_is_no_part_of_the_first_line_and_no_pictures_are_said(monkeypatch, capsys, clip_bundle, folder, tmp_path):
    plain = run(monkeypatch, capsys, ["embed", clip_bundle, "--texts", "-"], "a\ufeffb\nc\n".encode())
    assert run(monkeypatch, capsys, ["embed", clip_bundle, "--texts", "-"], "\ufeffa\ufeffb\nc\n".encode()) == plain
    (tmp_path / "empty").mkdir()
    code, lines, err = run(monkeypatch, capsys, ["embed", clip_bundle, "--images", tmp_path / "empty"])
    assert (code, lines) == (3, [])
    assert "holds no pictures" in err


def test_texts_with_lines_that_are_not_utf8(monkeypatch, capsys, clip_bundle):
    code, lines, _ = run(monkeypatch, capsys, ["embed", clip_bundle, "--texts", "-"], b"ein Kreis\n" + b"\xff\xfe\n\nx\n")
    assert code == 3
    assert [sorted(line) for line in lines] == [["embedding", "input"], ["error", "input"], ["error", "input"], ["embedding", "input"]]
    wanted = open_bundle(clip_bundle).encode_text(["ein Kreis", "x"])
    assert np.abs(np.array([lines[0]["embedding"], lines[3]["embedding"]]) - wanted).max() < 1e-6
    assert run(monkeypatch, capsys, ["embed", clip_bundle, "--texts", "-"], b"")[:2] == (0, [])


def test_a_torch_model_gives_the_bundle_s_vectors(monkeypatch, capsys, clip_bundle, clip_model, folder):
    vectors = []
    for model in (clip_bundle, clip_model.parent):  # a bundle, and the run it came from
        _, lines, _ = run(monkeypatch, capsys, ["embed", model, "--images", folder])
        assert ["error" in line for line in lines] == [True, False, False, False]
        vectors.append(np.array([line["embedding"] for line in lines[1:]]))
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.9999


def test_wrong_requests(monkeypatch, capsys, clip_bundle, language_bundle, tmp_path):
    for args, code, says in (
        (["embed", clip_bundle], 2, "exactly one of --images and --texts"),
        (["embed", clip_bundle, "--images", "-", "--texts", "-"], 2, "exactly one"),
        (["embed", tmp_path / "none", "--images", "-"], 3, "no such model directory"),
        (["embed", clip_bundle, "--images", tmp_path / "none.txt"], 3, "cannot be read"),
        (["embed", language_bundle, "--texts", "-"], 2, "embeds no pictures"),
    ):
        got, lines, err = run(monkeypatch, capsys, args)
        assert (got, lines) == (code, [])
        assert says in err
        assert "Traceback" not in err


def test_command_needs_no_torch_and_a_closed_pipe_is_quiet(clip_bundle, folder):
    script = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name.partition('.')[0] in ('torch', 'transformers', 'onnx', 'fastapi'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from vlm.cli.main import run\n"
        f"sys.argv = ['vlm', 'embed', {str(clip_bundle)!r}, '--images', '-', '--batch-size', '1']\n"
        "run()\n"
    )
    picture = str(sorted(folder.glob("picture*.png"))[0])
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer = process.stdin
    writer.write((picture + "\n").encode() * 300)
    writer.close()
    assert json.loads(process.stdout.readline())["input"] == picture
    process.stdout.close()
    assert process.wait(30) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
