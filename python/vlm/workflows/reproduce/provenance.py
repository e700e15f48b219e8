"""Where a result comes from: the commit of the code and the kind of machine. No names of users, hosts or paths."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

import vlm

_CODE = ("python", "cpp", "presets", "CMakeLists.txt")


@cache
def commit() -> str | None:
    """The commit of the source tree that runs, with `+changes` where its code differs from it; None outside of git."""
    root = Path(vlm.__file__).resolve().parents[2]
    head = _git(root, "rev-parse", "--short=12", "HEAD")
    if not head or not (root / "python" / "vlm").is_dir():
        return None
    return f"{head}+changes" if _git(root, "status", "--porcelain", "--", *_CODE) else head


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@cache
def machine() -> dict[str, Any]:
    """What a figure of time or the last bits of a weight may depend on."""
    return {
        "processor": platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vlm": vlm.__version__,
    }
