"""Wrong command lines: each gets its exit code, and a message that names the place and the remedy."""

from __future__ import annotations

import errno
import shutil
import tarfile

import pytest

from vlm.cli.main import as_vlm_error, main
from vlm.config.errors import ExitCode

SMALL = ["train.steps=1", "train.batch_size=4", "scale.threads=1", "evaluation.tasks=[]", "--no-report"]


def said(capsys, *words) -> tuple[int, str]:
    capsys.readouterr()
    code = main([str(word) for word in words])
    return code, capsys.readouterr().err


def test_a_bundle_is_no_run(capsys, clip_bundle, tmp_path):
    """A bundle that holds its preset.toml looks like a run: nothing may be written into it."""
    bundle = tmp_path / "bundle"
    shutil.copytree(clip_bundle, bundle)
    (bundle / "preset.toml").write_text('schema = 1\nextends = "clip-tiny"\n')
    before = sorted(bundle.rglob("*"))
    for words in (("pretrain", "--resume", bundle), ("report", bundle)):
        code, err = said(capsys, *words)
        assert code == 2
        assert f"{bundle}: this is a bundle, not a run" in err
    assert sorted(bundle.rglob("*")) == before


@pytest.mark.parametrize("words", [["-n", "3", "train.batch_size=2"], ["train.accumulate=8"]])
def test_a_batch_too_small_to_share_is_refused_before_anything_is_written(capsys, tmp_path, words):
    code, err = said(capsys, "pretrain", "clip-tiny", *SMALL, *words, "--output", tmp_path / "run")
    assert code == 2
    assert "train.batch_size" in err
    assert "expected at least" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_teacher_that_is_not_there_is_refused_before_data_are_read(capsys, monkeypatch, tmp_path, more):
    monkeypatch.setattr("vlm.training.start.open_split", lambda *_: pytest.fail("data were opened"))
    monkeypatch.setattr("vlm.training.run.open_split", lambda *_: pytest.fail("data were opened"))
    output = tmp_path / "run"
    code, err = said(capsys, "distill", "clip-tiny-distill", *SMALL, "--teacher", tmp_path / "none", *more, "--output", output)
    assert code == 3
    assert "companion 'teacher': no such model directory" in err
    assert not output.exists()


def test_a_report_onto_a_directory_is_a_wrong_request(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "preset.toml").write_text('schema = 1\n[method]\nkey = "tiny"\ntitle = "T"\n')
    code, err = said(capsys, "report", tmp_path / "run", "--output", tmp_path)
    assert code == 2
    assert f"{tmp_path}: is a directory, expected a file" in err


def test_an_output_that_is_a_file_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    code, err = said(capsys, "pretrain", "clip-tiny", *SMALL, "--output", tmp_path / "file")
    assert code == 2
    assert str(tmp_path / "file") in err
    assert "a fault of vlm" not in err


def test_a_full_disk_is_called_so():
    from safetensors import SafetensorError

    words = "Error while serializing: I/O error: No space left on device (os error 28)"  # what safetensors says of one
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left") as caught:
        full.write(b"x")
    for error in (caught.value, SafetensorError(words), OSError(errno.ENOSPC, "No space left on device", "run/model.bin")):
        known = as_vlm_error(error)
        assert known is not None
        assert (known.exit_code, known.message) == (ExitCode.RUN_FAILED, "the disk is full")
        assert "--resume" in str(known)
    assert "run/model.bin" in str(known)
    assert as_vlm_error(SafetensorError("incomplete metadata")) is None


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["train.stesp=3"], 2, "did you mean 'steps'"),
        (["train.steps=abc"], 2, "expected integer"),
        (["optimizer.lr=-1"], 2, "greater than 0"),
        (["--data", "/no/such.tar"], 3, "/no/such.tar"),
        (["--data", "empty.tar"], 3, "empty.tar: WebDataset tar shards: no samples"),
        (["--data", "s3://bucket/x.tar"], 3, "remote addresses"),
        (["data.label=nothing"], 3, "no sample has the field 'nothing'"),
    ],
)
def test_wrong_settings_and_data(capsys, monkeypatch, tmp_path, words, code, says):
    monkeypatch.chdir(tmp_path)
    tarfile.open("empty.tar", "w").close()
    got, err = said(capsys, "pretrain", "clip-tiny", *SMALL, *words, "--output", "run")
    assert got == code
    assert says in err
    assert not (tmp_path / "run").exists()


def test_paths_of_any_letters(capsys, tmp_path):
    output = tmp_path / "ünï 好" / "lauf eins"
    words = ("pretrain", "clip-tiny", *SMALL, "data.source=scenes:?n=40", "--output", output)
    assert said(capsys, *words)[0] == 0
    code, err = said(capsys, *words)
    assert code == 2
    assert f"--resume {output}" in err
