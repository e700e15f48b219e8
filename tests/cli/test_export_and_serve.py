"""`vlm export` and the requests that `vlm serve` refuses before it serves."""

from __future__ import annotations

import json
import socket

from tests.bundle_fixtures import model_directory
from vlm.cli.main import main
from vlm.runtime import open_any_bundle


def test_export_writes_a_bundle_and_reports_it(capsys, tmp_path):
    output = tmp_path / "bundle"
    run = model_directory("language").parent
    assert main(["export", str(run), "--output", str(output), "--opset", "20", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["opset"] == 20
    assert report["name"] == "language"
    assert report["least_cosine"] > 0.9999
    assert open_any_bundle(output).self_test() < 1e-4


def test_export_refuses_wrong_requests_before_any_work(capsys, clip_model, clip_bundle, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    for args, code, says in (
        ((clip_bundle, "--output", tmp_path / "b"), 2, "is a bundle already"),
        ((clip_model, "--output", tmp_path), 2, "holds no bundle"),
        ((clip_model, "--output", tmp_path / "b", "--opset", "12"), 2, "18"),
        ((tmp_path / "none", "--output", tmp_path / "b"), 3, "no such model"),
    ):
        assert main(["export", *map(str, args)]) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert says in err
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_serve_refuses_a_taken_port_a_bad_key_file_and_a_missing_model(capsys, clip_bundle, tmp_path):
    (tmp_path / "empty").write_text("# no key\n")
    (tmp_path / "short").write_text("abc\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for args, code, says in (
            ((clip_bundle, "--port", taken.getsockname()[1]), 2, "cannot listen"),
            ((clip_bundle, "--api-key-file", tmp_path / "none"), 2, "cannot be read"),
            ((clip_bundle, "--api-key-file", tmp_path / "empty"), 2, "at least 8"),
            ((clip_bundle, "--api-key-file", tmp_path / "short"), 2, "at least 8"),
            ((tmp_path / "none", "--port", 0), 3, "no such model"),
        ):
            assert main(["serve", *map(str, args)]) == code
            out, err = capsys.readouterr()
            assert out == ""
            assert says in err
