"""`bundle.json`: what a bundle holds, and the check that it still holds exactly that.

A bundle may come from anywhere: every size is bounded before reading, and every name must lie inside the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.config.errors import CheckpointError

SCHEMA = 1
MANIFEST = "bundle.json"
GOLDEN = "golden/golden.json"
MAX_JSON = 4 * 2**20
MAX_FILES = 4096
MOST = 2**31 - 1
"""Of anything that a bundle counts."""
REMEDY = "export the model again with vlm export"


@dataclass(frozen=True)
class Manifest:
    """The parsed bundle.json. `graphs`: part name -> {path, inputs, outputs}; `files`: path -> {bytes, sha256}."""

    kind: str
    name: str
    graphs: Mapping[str, Mapping[str, Any]]
    files: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, Any]

    def require(self, table: str, key: str, kind: type | tuple[type, ...], where: str) -> Any:
        """A value of a table of bundle.json. Raises CheckpointError when it is missing or of another type."""
        value = (self.data.get(table) or {}).get(key) if isinstance(self.data.get(table), dict) else None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CheckpointError(f"{table}.{key} is missing or of the wrong type", where=where, remedy=REMEDY)
        return value

    def count(self, table: str, key: str, where: str) -> int:
        """A number of at least 1. Raises CheckpointError."""
        value: int = self.require(table, key, int, where)
        if not 1 <= value <= MOST:
            raise CheckpointError(f"{table}.{key} is {value}, expected 1 to {MOST}", where=where, remedy=REMEDY)
        return value

    def tolerance(self, name: str, default: float, where: str) -> float:
        """How near golden values must come; `default` where a bundle of an earlier release does not say. Raises CheckpointError."""
        table = self.data.get("tolerance", {})
        value = table.get(name, default) if isinstance(table, dict) else None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise CheckpointError(f"tolerance.{name} is missing or no number from 0 to 1", where=where, remedy=REMEDY)
        return float(value)


@contextmanager
def golden_of(directory: Path) -> Iterator[dict[str, Any]]:
    """The golden values of a bundle, to be looked at inside. Raises CheckpointError where they are not as they were written."""
    path = inside(directory, GOLDEN)
    golden = read_json(path)
    try:
        yield golden
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"holds no golden values of this bundle: {error!r}"[:300], where=str(path), remedy=REMEDY) from error


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a directory that holds a bundle.json."""
    return (Path(path) / MANIFEST).is_file()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises CheckpointError naming the file."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON} bytes")
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=str(path), remedy=REMEDY) from error
    return value


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a bundle directory. Raises CheckpointError."""
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError("not a bundle: bundle.json is missing", where=str(directory), remedy=REMEDY)
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise CheckpointError(
            f"schema {data.get('schema')!r}, expected {SCHEMA}", where=str(path), remedy="use the vlm release that wrote it, or newer"
        )
    graphs, files = data.get("graphs"), data.get("files")
    if not isinstance(graphs, dict) or not isinstance(files, dict) or not isinstance(data.get("kind"), str):
        raise CheckpointError("kind, graphs and files are missing or of the wrong type", where=str(path), remedy=REMEDY)
    if len(files) > MAX_FILES:
        raise CheckpointError(f"lists {len(files)} files, expected at most {MAX_FILES}", where=str(path))
    for name, graph in graphs.items():
        path_of = graph.get("path") if isinstance(graph, dict) else None
        if not isinstance(path_of, str) or path_of not in files:
            raise CheckpointError(f"graph {name!r} is not among the listed files", where=str(path), remedy=REMEDY)
    return Manifest(data["kind"], str(data.get("name") or directory.name), graphs, files, data)


def inside(directory: Path, name: str) -> Path:
    """The path of a listed file. Raises CheckpointError when it would leave the bundle."""
    pure = PurePosixPath(name)
    bad = not name or "\\" in name or "\0" in name or pure.is_absolute() or ".." in pure.parts
    path = directory / name
    if bad or not path.resolve().is_relative_to(directory.resolve()):
        raise CheckpointError(f"{name!r} lies outside the bundle", where=str(directory / MANIFEST))
    return path


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Size and sha256 of every listed file. Raises CheckpointError naming the first that differs."""
    for name, entry in manifest.files.items():
        path = inside(directory, name)
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        try:
            status = path.stat()
        except OSError as error:
            raise CheckpointError("listed in bundle.json, but missing", where=str(path), remedy=REMEDY) from error
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError("not a regular file", where=str(path))
        if status.st_size != size:
            raise CheckpointError(f"{status.st_size} bytes, bundle.json says {size}", where=str(path), remedy=REMEDY)
        if sha256_of(path) != digest:
            raise CheckpointError("was altered: its sha256 is not the one in bundle.json", where=str(path), remedy=REMEDY)


def sha256_of(path: Path) -> str:
    """Hexadecimal digest, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
