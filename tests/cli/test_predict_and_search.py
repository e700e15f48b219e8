"""`vlm predict` and `vlm search`."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest

from vlm.cli.main import main
from vlm.export.drawings import drawn_picture
from vlm.runtime import open_bundle


@pytest.fixture
def pictures(tmp_path):
    paths = []
    for i in range(6):
        paths.append(tmp_path / f"{i}.png")
        drawn_picture(30 + 9 * i, 50, i).save(paths[-1])
    return paths


def run(capsys, *args):
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_predict_gives_every_label_in_order(capsys, clip_bundle, siglip_bundle, pictures):
    for path in (clip_bundle, siglip_bundle):
        bundle = open_bundle(path)
        labels = ("--labels", "cat, dog,blue square", "--template", "a {}")
        code, out, _ = run(capsys, "predict", path, pictures[0], pictures[1], *labels, "--json")
        assert code == 0
        answers = [json.loads(line) for line in out.splitlines()]
        assert [a["input"] for a in answers] == [str(p) for p in pictures[:2]]
        wanted = bundle.score(pictures[:2], ["a cat", "a dog", "a blue square"])
        for answer, row in zip(answers, wanted):
            found = {p["label"]: p["score"] for p in answer["predictions"]}
            assert [found[name] for name in ("cat", "dog", "blue square")] == pytest.approx(row.tolist(), abs=1e-4)
            assert answer["predictions"] == sorted(answer["predictions"], key=lambda p: -p["probability"])
            assert answer["form"] == bundle.form
            total = sum(p["probability"] for p in answer["predictions"])
            assert (total == pytest.approx(1, abs=1e-5)) == (bundle.form == "softmax")


def test_predict_reads_labels_from_a_file_and_a_picture_from_stdin(capsys, monkeypatch, clip_bundle, pictures, tmp_path):
    (tmp_path / "labels.txt").write_text("cat\n\nred, and blue\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(pictures[0].read_bytes())))
    code, out, _ = run(capsys, "predict", clip_bundle, "-", "--labels", f"@{tmp_path / 'labels.txt'}", "--json")
    assert code == 0
    assert {p["label"] for p in json.loads(out)["predictions"]} == {"cat", "red, and blue"}
    code, out, _ = run(capsys, "predict", clip_bundle, pictures[0], "--labels", "a,b,c", "-k", 1)
    assert code == 0
    assert len(out.splitlines()) == 2


def test_predict_refuses_wrong_requests(capsys, clip_bundle, pictures, tmp_path):
    for args, code, says in (
        ((clip_bundle, pictures[0], "--labels", " , "), 2, "no label"),
        ((clip_bundle, pictures[0], "--labels", "a", "--template", "x"), 2, "{}"),
        ((clip_bundle, tmp_path / "none.png", "--labels", "a"), 3, "none.png"),
        ((clip_bundle, "--labels", "a"), 2, "IMAGE"),
    ):
        got, out, err = run(capsys, "predict", *args)
        assert (got, out) == (code, "")
        assert says in err


def test_predict_goes_on_after_a_picture_that_cannot_be_read(capsys, clip_bundle, pictures, tmp_path):
    (tmp_path / "page.png").write_text("<html>")
    args = ("predict", clip_bundle, tmp_path / "page.png", pictures[0], "--labels", "a,b")
    code, out, err = run(capsys, *args, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert (code, [sorted(row)[0] for row in rows]) == (3, ["error", "form"])
    assert "page.png" in err
    code, out, _ = run(capsys, *args)
    assert (code, out.splitlines()[0]) == (3, str(pictures[0]))


def test_search_finds_the_nearest_of_an_index(capsys, clip_bundle, pictures, tmp_path):
    index = tmp_path / "index.jsonl"
    assert main(["embed", str(clip_bundle), "--images", str(tmp_path)]) == 0
    index.write_text(capsys.readouterr().out + '{"input": "bad.png", "error": "why"}\n\n')
    bundle = open_bundle(clip_bundle)
    cosines = (bundle.encode_image(pictures) @ bundle.encode_text(["a red circle"]).T)[:, 0]
    code, out, _ = run(capsys, "search", clip_bundle, "a red circle", "--index", index, "-k", 3, "--json")
    assert code == 0
    found = [json.loads(line) for line in out.splitlines()]
    best = np.argsort(-cosines)[:3]
    assert [f["input"] for f in found] == [str(pictures[i]) for i in best]
    assert [f["rank"] for f in found] == [1, 2, 3]
    assert [f["cosine"] for f in found] == pytest.approx(cosines[best].tolist(), abs=1e-5)
    code, out, _ = run(capsys, "search", clip_bundle, "x", "--index", index, "-k", 99)
    assert len(out.splitlines()) == len(pictures)


def test_search_over_more_rows_than_a_block(capsys, monkeypatch, clip_bundle, tmp_path):
    monkeypatch.setattr("vlm.cli.search._ROWS", 7)
    rows = np.random.default_rng(0).normal(size=(50, 24)).round(4)
    index = tmp_path / "index.jsonl"
    index.write_text("".join(json.dumps({"input": i, "embedding": row.tolist()}) + "\n" for i, row in enumerate(rows)))
    _, out, _ = run(capsys, "search", clip_bundle, "x", "--index", index, "-k", 50, "--json")
    wanted = np.argsort(-(rows @ open_bundle(clip_bundle).encode_text(["x"])[0]), kind="stable")
    assert [json.loads(line)["input"] for line in out.splitlines()] == [str(i) for i in wanted]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"input": "a", "embedding": [1, 2]}', "index.jsonl:2: a vector of 2 numbers, this model gives 24"),
        ("{", "index.jsonl:2: not JSON"),
        (json.dumps({"input": "x", "embedding": [float("nan")] * 24}), "index.jsonl:2: a vector with a number that is not finite"),
        ('{"embedding": [1]}', "index.jsonl:2: expected"),
        ('{"input": "a", "embedding": ["x"]}', "index.jsonl:2: expected"),
        ("[1]", "index.jsonl:2: expected"),
    ],
)
def test_search_names_the_bad_line(capsys, clip_bundle, tmp_path, line, says):
    index = tmp_path / "index.jsonl"
    index.write_text(json.dumps({"input": "a", "embedding": [0.0] * 24}) + "\n" + line + "\n")
    code, out, err = run(capsys, "search", clip_bundle, "x", "--index", index)
    assert (code, out) == (3, "")
    assert says in err


def test_search_says_that_an_index_is_empty_or_missing(capsys, clip_bundle, tmp_path):
    (tmp_path / "index.jsonl").write_text("")
    for name, says in (("index.jsonl", "holds no vectors"), ("none.jsonl", "cannot be read")):
        code, _, err = run(capsys, "search", clip_bundle, "x", "--index", tmp_path / name)
        assert code == 3
        assert says in err
