"""A disk that refuses at some byte: the error names the file, nothing half-written has its final name, and what was whole stays."""

import contextlib
import errno
import os
import resource

import pytest
import torch

from vlm.config.errors import RunFailed
from vlm.training.checkpoint import Checkpoints
from vlm.training.directory import RunDirectory
from vlm.training.metrics import MetricsLog
from vlm.types.tensor_file import save_tensors


@contextlib.contextmanager
def no_file_above(size):
    """The system refuses (EFBIG) to let any file of this process grow past `size` bytes."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_tensors_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors({"a": torch.zeros(4)}, path)
    before = path.read_bytes()
    with no_file_above(4096), pytest.raises(OSError, match="too large") as caught:
        save_tensors({"a": torch.zeros(4096)}, path)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, {"model": {"a": torch.zeros(4)}})
    with no_file_above(4096), pytest.raises(RunFailed, match="too large") as caught:
        checkpoints.save(2, {"model": {"a": torch.zeros(4096)}})
    assert str(tmp_path / "step-2") in str(caught.value)
    assert os.listdir(tmp_path) == ["step-1"]
    assert torch.equal(checkpoints.load(1)["model"]["a"], torch.zeros(4))


def test_weights_of_a_stage_that_do_not_fit(tmp_path):
    directory = RunDirectory(tmp_path)
    with no_file_above(4096), pytest.raises(RunFailed, match="too large"):
        directory.write_stage(0, {"a": torch.zeros(4096)})
    assert os.listdir(tmp_path / "stages") == []


def test_a_line_of_the_log_that_does_not_fit_names_the_log_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"train/loss": 1.0})
    size = log.offset
    with no_file_above(size), pytest.raises(RunFailed, match="metrics.jsonl") as caught:
        log.write(2, {"train/loss": 1.0})
    assert "--resume" in str(caught.value)
    log.close()
    assert (tmp_path / "metrics.jsonl").stat().st_size == size


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    with no_file_above(100), pytest.raises(RunFailed, match="too large"):
        directory.create("schema = 1\n")
    assert not (tmp_path / "run").exists()
    directory.create("schema = 1\n")
    assert (tmp_path / "run" / "preset.toml").is_file()
