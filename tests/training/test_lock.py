"""Two processes and one run: the second is refused, and nothing of the first is touched."""

import os
import signal
import subprocess
import sys

import pytest

from tests.training.test_resume import begin
from vlm.cli.main import main
from vlm.config.errors import RequestError
from vlm.training import lock
from vlm.training.lock import is_locked, locked_run
from vlm.training.run import Run

HOLD = """
import sys, time
from pathlib import Path
from vlm.training.lock import locked_run
with locked_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that trains `run`, as far as anyone can see."""
    (tmp_path / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_until_the_first_ends_however_it_ends(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    assert is_locked(tmp_path / "run")
    with pytest.raises(RequestError, match="another process is training this run"), locked_run(tmp_path / "run"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locked_run(tmp_path / "run"):
        assert is_locked(tmp_path / "run")
    assert not is_locked(tmp_path / "run")
    assert os.listdir(tmp_path / "run") == []


def test_resume_of_a_run_that_is_trained_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.1)
    run = begin(tmp_path / "run", "train.steps=2")
    partial = tmp_path / "run/checkpoints/.step-1.partial"
    partial.mkdir(parents=True)
    with locked_run(tmp_path / "run"):
        with pytest.raises(RequestError, match="another process"):
            Run.resume(tmp_path / "run", note=lambda text: None).train()
        assert partial.is_dir()
    assert run.train().steps == 2
    assert not is_locked(tmp_path / "run")


def test_runs_list_says_which_are_running(tmp_path, holder, capsys):
    (tmp_path / "run/preset.toml").write_text("schema = 1\n")
    (tmp_path / "bundle").mkdir()
    for name in ("preset.toml", "bundle.json"):
        (tmp_path / "bundle" / name).write_text("")
    assert main(["runs", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "running" in lines[1]


def test_a_missing_folder_is_not_locked(tmp_path):
    assert not is_locked(tmp_path / "none")
