"""The files of a bundle while it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vlm.runtime.manifest import MANIFEST, sha256_of


def files_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Path inside the bundle -> size and digest, of every file but bundle.json."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p != folder / MANIFEST]
    return {p.relative_to(folder).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in files}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
