"""Checkpoints: complete or absent, never half.

`checkpoints/step-N/` holds one safetensors file a section of the state tree, `state.json` for the rest, and
`COMPLETE`, written last, with the SHA-256 of every file. The folder is made under a temporary name, flushed to
disk and renamed. Reading verifies the hashes and falls back to the newest checkpoint that holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file

from vlm.config.errors import CheckpointError, RunFailed
from vlm.types.state import Tree, join_tree, split_tree
from vlm.types.tensor_file import save_tensors

SCHEMA = 1
MARKER = "COMPLETE"
_NAME = re.compile(r"step-(\d+)")


def sha256_of(path: Path) -> str:
    """Hexadecimal digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Force a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, final: Path) -> None:
    """Make a finished folder visible under its name, replacing an older one; both survive a crash or neither is lost."""
    for file in temporary.rglob("*"):
        flush(file)
    flush(temporary)
    old = final.with_name(final.name + ".old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(temporary, final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run. keep: how many of the newest to keep; 0 keeps all."""

    folder: Path
    keep: int = 2

    def steps(self) -> list[int]:
        """Steps with a completeness marker, ascending."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir() if (path / MARKER).is_file())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def save(self, step: int, tree: Tree) -> Path:
        """Write one checkpoint. Raises RunFailed naming the path when the disk refuses; older checkpoints stay."""
        final, temporary = self.path(step), self.folder / f".step-{step}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            tensors, plain = split_tree(tree)
            sections: dict[str, dict[str, Any]] = {}
            for name, tensor in tensors.items():
                section, _, rest = name.partition("/")
                sections.setdefault(section, {})[rest or section] = tensor.detach().to("cpu").contiguous().clone()
            for section, members in sections.items():
                save_tensors(members, temporary / f"{section}.safetensors")
            (temporary / "state.json").write_text(json.dumps(plain), encoding="utf-8")
            hashes = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            for path in temporary.iterdir():
                flush(path)
            (temporary / MARKER).write_text(json.dumps({"schema": SCHEMA, "step": step, "sha256": hashes}, indent=1))
            publish(temporary, final)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise RunFailed(
                f"cannot write a checkpoint: {error.strerror or error}",
                where=str(final),
                remedy="free space or choose another --output; earlier checkpoints are untouched and --resume continues from them",
            ) from error
        self._retire()
        return final

    def _retire(self) -> None:
        if self.keep:
            for step in self.steps()[: -self.keep]:
                shutil.rmtree(self.path(step), ignore_errors=True)

    def load(self, step: int) -> Tree:
        """One checkpoint's tree. Raises CheckpointError naming the file that is missing, altered or unreadable."""
        folder = self.path(step)
        try:
            marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"unreadable completeness marker: {error}", where=str(folder / MARKER)) from error
        if marker.get("schema") != SCHEMA:
            raise CheckpointError(
                f"checkpoint schema {marker.get('schema')!r}, expected {SCHEMA}",
                where=str(folder),
                remedy="resume with the release that wrote it",
            )
        tensors = {}
        for name, digest in marker["sha256"].items():
            path = folder / name
            if not path.is_file() or sha256_of(path) != digest:
                raise CheckpointError("is missing or altered (its hash differs)", where=str(path))
            if path.suffix == ".safetensors":
                try:
                    section = load_file(path)
                except (OSError, SafetensorError) as error:
                    raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error
                for inner, tensor in section.items():
                    tensors[path.stem if inner == path.stem else f"{path.stem}/{inner}"] = tensor
        plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return join_tree(tensors, plain)

    def newest(self, warn: Callable[[str], None], *, strict: bool = False) -> tuple[int, Tree] | None:
        """The newest checkpoint that holds, or None. An altered one is reported and the one before it is used;
        strict raises instead."""
        for step in reversed(self.steps()):
            try:
                return step, self.load(step)
            except CheckpointError as error:
                if strict:
                    raise
                warn(f"{error}; trying the checkpoint before it")
        return None
