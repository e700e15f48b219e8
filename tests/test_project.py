"""The project's own promises: the README's commands, what CI runs, and the hooks."""

import re
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]

SET_UP = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
TRY = SET_UP + "'.[train]' && vlm pretrain clip-tiny --output runs/first"
TEST = SET_UP + "'.[test]' && pytest"


def test_the_readme_offers_one_command_to_try_and_one_to_test():
    text = (ROOT / "README.md").read_text("utf-8")
    blocks = dict(re.findall(r"^<!-- ci: (\w+) -->\n```bash\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL))
    assert {name: blocks[name] for name in ("try", "test")} == {"try": TRY, "test": TEST}


def test_ci_runs_the_readmes_test_command_word_for_word():
    done = subprocess.run(["bash", str(ROOT / ".ci/run"), "--print"], capture_output=True, text=True, check=True)
    assert done.stdout == TEST + "\n"


def test_every_constraint_is_one_exact_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [line for line in lines if line and not line.startswith("#")]
    assert pinned
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.+]*", line) for line in pinned)


def test_the_base_install_has_no_torch_and_the_training_extra_has():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in project["dependencies"]}
    assert not names & {"torch", "transformers", "peft", "onnx"}
    assert any(line.startswith("torch") for line in project["optional-dependencies"]["train"])
    assert project["scripts"] == {"vlm": "vlm.cli.main:run"}


def test_what_the_build_leaves_out_is_anchored_at_the_root():
    """Without the slash `data` would also leave `vlm/data` out of the wheel."""
    excluded = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["scikit-build"]["sdist"]["exclude"]
    assert all(pattern.startswith(("/", ".")) for pattern in excluded), excluded


def test_hooks_are_local():
    text = (ROOT / ".pre-commit-config.yaml").read_text()
    assert re.findall(r"repo: (.*)", text) == ["local"]
    assert "://" not in text
