"""The tour of the README runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOUR = re.search(r"^<!-- ci: tour -->\n```bash\n(.*?)\n```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_tour_is_there_and_names_every_kind_of_command():
    assert TOUR is not None
    for word in ("pretrain", "finetune", "distill", "evaluate", "report", "export", "embed", "--resume", "--dry-run"):
        assert word in TOUR[1]


@pytest.mark.long
def test_every_command_of_the_tour_runs_as_it_stands(tmp_path):
    assert TOUR is not None
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", TOUR[1]],
        cwd=tmp_path, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs/tour/report.html").is_file()
