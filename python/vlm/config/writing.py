"""Resolved values as TOML with provenance comments, and their digest."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from vlm.config.positions import Path
from vlm.config.tree import Origin

_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_ESCAPES = {"\\": "\\\\", '"': '\\"', "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
_WIDTH = 100


def to_toml(values: Mapping[str, Any], origins: Mapping[Path, Origin] | None = None) -> str:
    """TOML that reads back as `values`; with `origins`, each line ends with a comment that says what set it.

    Raises TypeError for a value that TOML cannot say (None among them), naming its path.
    """
    lines: list[str] = []
    _table(values, (), lines, origins or {})
    return "\n".join(lines).strip("\n") + "\n"


def digest(values: Mapping[str, Any]) -> str:
    """64 hex digits that depend on the values alone: not on key order, origins, machine or Python version."""
    text = json.dumps(
        _canonical(values), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()


def toml_value(value: Any) -> str:
    """A value as it stands behind `=`: for overrides that a program writes. Raises TypeError as `to_toml` does."""
    return _value(value, ("value",))


def _canonical(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {"table": {str(key): _canonical(item) for key, item in value.items()}}
    if isinstance(value, list | tuple):
        return [_canonical(item) for item in value]
    if isinstance(value, float):
        return {"float": repr(value)}
    if isinstance(value, datetime.date | datetime.time):
        return {"time": value.isoformat()}
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(f"a preset cannot hold a {type(value).__name__}")


def _is_tables(value: Any) -> bool:
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)
    )


def _table(table: Mapping[str, Any], path: Path, lines: list[str], origins: Mapping[Path, Origin]) -> None:
    plain = {
        key: item for key, item in table.items() if not isinstance(item, Mapping) and not _is_tables(item)
    }
    for key, item in plain.items():
        lines.append(f"{_key(key)} = {_value(item, (*path, key))}{_comment(origins.get((*path, key)))}")
    for key, item in table.items():
        if key in plain:
            continue
        here = (*path, key)
        name = ".".join(_key(part) for part in here if isinstance(part, str))
        if isinstance(item, Mapping):
            # A header is needed where the table has values of its own, or nothing at all.
            if not item or any(not isinstance(v, Mapping) and not _is_tables(v) for v in item.values()):
                lines += ["", f"[{name}]"]
            _table(item, here, lines, origins)
        else:
            for index, entry in enumerate(item):
                lines += ["", f"[[{name}]]"]
                _table(entry, (*here, index), lines, origins)


def _comment(origin: Origin | None) -> str:
    if origin is None:
        return ""
    return "  # from " + "".join(c if c.isprintable() else "?" for c in str(origin))


def _key(key: str) -> str:
    return key if key and _BARE.issuperset(key) else _string(key)


def _string(text: str) -> str:
    out = []
    for c in text:
        if c in _ESCAPES:
            out.append(_ESCAPES[c])
        elif ord(c) < 0x20 or ord(c) == 0x7F:
            out.append(f"\\u{ord(c):04X}")
        else:
            out.append(c)
    return '"' + "".join(out) + '"'


def _value(value: Any, path: Path) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple):
        items = [_value(item, (*path, index)) for index, item in enumerate(value)]
        if sum(len(item) + 2 for item in items) <= _WIDTH:
            return "[" + ", ".join(items) + "]"
        return "[\n" + "".join(f"  {item},\n" for item in items) + "]"
    if isinstance(value, Mapping):
        return (
            "{"
            + ", ".join(f"{_key(key)} = {_value(item, (*path, key))}" for key, item in value.items())
            + "}"
        )
    name = ".".join(str(part) for part in path)
    raise TypeError(f"{name} is a {type(value).__name__}: TOML cannot say it")
