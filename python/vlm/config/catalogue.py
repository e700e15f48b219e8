"""Which presets there are, read from the head tables of their files: quick, without pydantic and torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config.errors import PresetError
from vlm.config.files import find, keys_in, packaged_directory, read_toml

BASES = "base"
"""Folder of building blocks: extended by presets, never run and never listed."""


@dataclass(frozen=True)
class PresetEntry:
    """One line of `vlm presets list`. `problem`: why its head could not be read, None if it could."""

    key: str
    title: str
    command: str
    path: str
    tags: tuple[str, ...] = ()
    problem: str | None = None


def list_presets(search: Sequence[Path] = ()) -> list[PresetEntry]:
    """Every preset of `search` and of the package, by key; where two have a key, the first directory's.

    A file that cannot be read is listed with its `problem`, so that one broken file hides no other.
    """
    entries: dict[str, PresetEntry] = {}
    for root in (*search, packaged_directory()):
        for key in keys_in(root):
            if key.split("/")[0] != BASES and key not in entries:
                entries[key] = _entry(root / f"{key}.toml", key, tuple(search))
    return [entries[key] for key in sorted(entries)]


def _entry(path: Path, key: str, search: tuple[Path, ...]) -> PresetEntry:
    try:
        own, _ = read_toml(path)
        method = {**_inherited(own, path, search, (path,)), **_method(own)}
    except PresetError as error:
        return PresetEntry(key, "", "", str(path), problem=str(error))
    tags = method.get("tags", ())
    return PresetEntry(
        key,
        str(method.get("title", "")),
        str(method.get("command", "pretrain")),
        str(path),
        tuple(str(tag) for tag in tags) if isinstance(tags, list | tuple) else (),
    )


def _method(values: dict[str, Any]) -> dict[str, Any]:
    method = values.get("method", {})
    return method if isinstance(method, dict) else {}


def _inherited(
    values: dict[str, Any], path: Path, search: tuple[Path, ...], chain: tuple[Path, ...]
) -> dict[str, Any]:
    """The `method` tables of what a preset extends, later ones winning."""
    extends = values.get("extends", ())
    method: dict[str, Any] = {}
    for name in [extends] if isinstance(extends, str) else extends:
        base = find(str(name), search, beside=path.parent)
        if base in chain:
            raise PresetError("presets extend each other in a circle", where=str(path))
        own, _ = read_toml(base)
        method |= _inherited(own, base, search, (*chain, base)) | _method(own)
    return method
