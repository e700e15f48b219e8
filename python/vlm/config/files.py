"""Preset files: where they are found, reading one, and bringing an older schema up to date."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from vlm.config.errors import PresetError
from vlm.config.nearest import did_you_mean
from vlm.config.positions import scan
from vlm.config.tree import Node, node_of

SCHEMA = 1
"""The schema that this release writes and reads."""

Migration = Callable[[dict[str, Any]], dict[str, Any]]

MIGRATIONS: dict[int, Migration] = {}
"""version -> pure function that turns the values of that version into those of the next one."""

_LARGEST = 4 << 20


@dataclass(frozen=True)
class PresetFile:
    """One file, read and up to date, before inheritance. `tree` has no `extends` and no `schema`."""

    path: Path
    shown: str
    label: str
    text: str
    tree: Node
    extends: tuple[str, ...]
    extends_place: str


def packaged_directory() -> Path:
    """The directory of the presets that come with vlm."""
    return Path(str(files("vlm.presets").joinpath("__init__.py"))).parent


def shown_path(path: Path) -> str:
    """How messages name a file: relative below the working directory, absolute elsewhere."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except (ValueError, OSError):
        return str(path)


def label_of(path: Path) -> str:
    """How provenance names a file: packaged presets as `presets/...`, others as they are shown."""
    try:
        return str(Path("presets") / path.resolve().relative_to(packaged_directory().resolve()))
    except ValueError:
        return shown_path(path)


def keys_in(directory: Path) -> list[str]:
    """Keys of the preset files below a directory: `clip`, `base/dual-encoder`."""
    return sorted(
        path.relative_to(directory).with_suffix("").as_posix() for path in directory.rglob("*.toml")
    )


def find(name: str, search: Sequence[Path] = (), beside: Path | None = None, chain: str = "") -> Path:
    """The file of a preset.

    A name that ends in `.toml`, or a directory that holds `preset.toml` (a run), is a path, relative to `beside` if given.
    Anything else is a key, looked up in `search`, the packaged presets, and `beside`, in this order.
    Raises PresetError that lists where it looked and the nearest key.
    """
    place = Path(name).expanduser() if beside is None else beside / Path(name).expanduser()
    if name.endswith(".toml"):
        if place.is_file():
            return place
        raise PresetError(f"there is no preset file {shown_path(place)}", where=chain or None)
    roots = [*search, packaged_directory(), *([beside] if beside else [])]
    for root in roots:
        candidate = root / f"{name}.toml"
        if _inside(candidate, root) and candidate.is_file():
            return candidate
    if (place / "preset.toml").is_file():
        return place / "preset.toml"
    known = [key for root in roots for key in keys_in(root) if root.is_dir()] if len(name) < 200 else []
    looked = ", ".join(shown_path(root) for root in roots)
    raise PresetError(
        f"there is no preset {name!r}{did_you_mean(name, known)}",
        where=chain or None,
        remedy=f"looked in {looked}; `vlm presets list` shows the keys, and a path must end in .toml",
    )


def _inside(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Values and text of a TOML file. Raises PresetError with file, line and column."""
    shown = shown_path(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise PresetError(f"the file has more than {_LARGEST >> 20} MiB: that is no preset", where=shown)
        text = path.read_bytes().decode("utf-8-sig")  # Windows editors write a mark at the start
    except OSError as error:
        raise PresetError(f"cannot read the preset: {error.strerror}", where=shown) from error
    except UnicodeDecodeError as error:
        raise PresetError(f"not UTF-8 at byte {error.start}: that is no preset", where=shown) from error
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise PresetError(
            *_toml_message(str(error)), where=f"{shown}:{_toml_place(str(error), text)}"
        ) from None
    except RecursionError:
        raise PresetError("tables or lists are nested too deeply", where=shown) from None


_AT = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")


def _toml_message(message: str) -> tuple[str]:
    text = _AT.sub("", message)
    return (f"not valid TOML: {text[:1].lower()}{text[1:]}",)


def _toml_place(message: str, text: str) -> str:
    found = _AT.search(message)
    if found and found.group(1):
        return f"{found.group(1)}:{found.group(2)}"
    lines = text.splitlines() or [""]
    return f"{len(lines)}:{len(lines[-1]) + 1}"


def read_preset(
    path: Path, *, schema: int = SCHEMA, migrations: dict[int, Migration] | None = None
) -> PresetFile:
    """One preset file, migrated to `schema`. Raises PresetError with file, line and column."""
    values, text = read_toml(path)
    shown, label = shown_path(path), label_of(path)
    positions = scan(text)

    def place(*key: str) -> str:
        position = positions.get(key)
        return f"{shown}:{position.value_line}:{position.value_column}" if position else f"{shown}:1:1"

    version = values.get("schema")
    if version is None:
        raise PresetError(
            "the preset does not say its schema",
            where=f"{shown}:1:1",
            remedy=f"begin it with: schema = {schema}",
        )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PresetError(
            f"schema must be a whole number from 1 to {schema}, got {version!r}", where=place("schema")
        )
    if version > schema:
        raise PresetError(
            f"the preset has schema {version}; this vlm reads schemas up to {schema}",
            where=place("schema"),
            remedy="it was written for a newer release: pip install --upgrade vlm-forge",
        )
    extends = values.pop("extends", ())
    extends = (extends,) if isinstance(extends, str) else extends
    if not isinstance(extends, list | tuple) or not all(isinstance(name, str) and name for name in extends):
        raise PresetError("extends must be the key of a preset or a list of keys", where=place("extends"))
    table = MIGRATIONS if migrations is None else migrations
    for step in range(version, schema):
        if step not in table:
            raise PresetError(f"there is no way from schema {step} to {step + 1}", where=place("schema"))
        values = table[step](values)
    values["schema"] = schema
    tree = node_of(values, positions, shown, label)
    return PresetFile(path, shown, label, text, tree, tuple(extends), place("extends"))
