"""Finished units and verdicts, on disk: one readable JSON file a claim, with one unit a line.

The file is written whole and renamed, so it is never half; a killed measurement loses at most the unit it was in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config.errors import DataError

SCHEMA = 1
MAX_FILE = 64 * 2**20


@dataclass(frozen=True)
class Stored:
    """What one results file holds: units by content key, and verdicts, the newest last."""

    units: dict[str, dict[str, Any]]
    verdicts: list[dict[str, Any]]


class Results:
    """The results folder: `KEY.json` for each claim."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / f"{key.replace('/', '-')}.json"

    def read(self, key: str) -> Stored:
        """What is stored of a claim; nothing, where there is no file yet. Raises DataError for a file that is none of ours."""
        path = self.path(key)
        if not path.is_file():
            return Stored({}, [])
        try:
            if path.stat().st_size > MAX_FILE:
                raise DataError(f"larger than {MAX_FILE} bytes", where=str(path))
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["schema"] != SCHEMA:
                raise DataError(f"schema {value['schema']}, expected {SCHEMA}", where=str(path))
            return Stored({unit["key"]: unit for unit in value["units"]}, list(value["verdicts"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"is no file of results: {error}", where=str(path), remedy="move it away; its units are measured again"
            ) from error

    def find(self, unit_key: str) -> dict[str, Any] | None:
        """A finished unit of any claim: claims share arms, and what is equal is trained once."""
        for key in self.claims():
            unit = self.read(key).units.get(unit_key)
            if unit is not None:
                return unit
        return None

    def claims(self) -> Iterator[str]:
        for path in sorted(self.folder.glob("*.json")):
            yield path.stem

    def add_unit(self, key: str, unit: dict[str, Any]) -> None:
        stored = self.read(key)
        self._write(key, {**stored.units, unit["key"]: unit}, stored.verdicts)

    def add_verdict(self, key: str, verdict: dict[str, Any]) -> None:
        """The newest of its data label counts; one that says the same of the same units takes the older one's place."""
        stored = self.read(key)
        kept = [old for old in stored.verdicts if old.get("units") != verdict["units"]]
        self._write(key, stored.units, [*kept, verdict])

    def latest(self, key: str, data: str) -> dict[str, Any] | None:
        found = [verdict for verdict in self.read(key).verdicts if verdict["data"] == data]
        return found[-1] if found else None

    def _write(self, key: str, units: dict[str, dict[str, Any]], verdicts: list[dict[str, Any]]) -> None:
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f"  {_line(unit)}" for unit in units.values())
        rulings = ",\n".join(f"  {_line(verdict)}" for verdict in verdicts)
        text = f'{{\n"schema": {SCHEMA},\n"units": [\n{lines}\n],\n"verdicts": [\n{rulings}\n]\n}}\n'
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _line(value: dict[str, Any]) -> str:
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    """Numbers that JSON cannot say become null; an interval without bounds is the only case."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
