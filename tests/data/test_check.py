"""`vlm data check` and `vlm data inspect`."""

from __future__ import annotations

import json
from typing import NamedTuple

import pytest
from PIL import Image

from tests.data.data_makers import sample, write_shards, write_tar, write_texts
from vlm.cli.main import main


@pytest.fixture
def run(capsys):
    """Runs `vlm data ...`: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = main(["data", *map(str, arguments)])
        return Result(code, *capsys.readouterr())

    return call


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def test_check_describes_good_data(run, tmp_path):
    uri = write_shards(tmp_path, 20, 2)
    result = run("check", uri, "--json")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert (report["samples"], report["good"], report["bad"]) == (20, 20, 0)
    assert report["pictures"]["sizes"] == {"16x16": 20}
    assert report["texts"]["distinct"] == 20
    assert report["fields"]["category"] == 20
    assert report["source"]["kind"] == "WebDataset tar shards"
    assert "20 good, 0 bad" in run("check", uri).stdout


def test_check_exits_with_3_past_the_budget_and_names_the_samples(run, tmp_path):
    samples = {f"{n}": sample(n) for n in range(9)} | {
        "bad": {"png": b"", "txt": b"x"},
        "lone": {"txt": b"x"},
    }
    uri = write_tar(tmp_path / "a.tar", samples)
    result = run("check", uri, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["reasons"] == {"empty": 1, "missing_image": 1}
    text = run("check", uri)
    assert "a.tar:bad: empty" in text.stdout
    assert run("check", uri, "--budget", 0.2).exit_code == 0


def test_check_reads_text_alone_and_several_files(run, tmp_path):
    uri = write_texts(tmp_path, 10)
    assert json.loads(run("check", uri, "--json").stdout)["texts"]["count"] == 10
    write_shards(tmp_path / "s", 6, 2)
    files = sorted((tmp_path / "s").glob("*.tar"))
    assert json.loads(run("check", *files, "--json").stdout)["samples"] == 6


@pytest.mark.parametrize("command", ["check", "inspect"])
def test_missing_data_exit_with_3_and_a_name(run, command, tmp_path):
    result = run(command, tmp_path / "none-{0..1}.tar")
    assert result.exit_code == 3
    assert "none-0.tar" in result.stderr
    assert "Traceback" not in result.stderr
    assert run(command, "scenes:?n=3", "--nonsense").exit_code == 2


def test_inspect_shows_samples_and_draws_a_sheet(run, tmp_path):
    samples = {"bad": {"png": b"", "txt": b"x"}} | {f"{n}": sample(n) for n in range(9)}
    uri = write_tar(tmp_path / "a.tar", samples)
    result = run("inspect", uri, "-n", 4, "--json", "--output", tmp_path / "sheet.png")
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    assert shown["source"]["samples"] == 10
    assert shown["samples"][0] == {"key": "a.tar:bad", "bad": "empty", "detail": ""}
    assert shown["samples"][1]["picture"] == [16, 16]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 960
    assert "drawn scenes" in run("inspect", "scenes:?n=3", "-n", 1).stdout
    assert run("inspect", uri, "--output", tmp_path / "no" / "sheet.png").exit_code == 1
