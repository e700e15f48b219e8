"""What a run left behind, read for its report. Whatever is missing or damaged is said, and never ends the report."""

from __future__ import annotations

import json
import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.config.errors import DataError
from vlm.evaluation.result import read_result

MAX_METRICS = 512 * 2**20
MAX_HEADER = 100 * 2**20

_ORDER = {"retrieval": 0, "vqa": 1, "grounding": 2, "caption": 3, "hallucination": 4, "cost": 99}

Series = dict[str, list[tuple[float, float]]]
"""name -> (step, value) in the order they were logged."""


@dataclass
class RunRecord:
    """preset, environment: what was read, {} where it is missing. series: numbers by step. results: stored
    evaluations. parameters: counted in the weight file. missing: what could not be read, in words."""

    root: Path
    preset: dict[str, Any] = field(default_factory=dict)
    preset_text: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    series: Series = field(default_factory=dict)
    times: list[tuple[float, float]] = field(default_factory=list)
    results: list[dict[str, Any]] = field(default_factory=list)
    parameters: int | None = None
    refused: int = 0
    finished: bool = False
    missing: list[str] = field(default_factory=list)

    def setting(self, path: str, default: Any = None) -> Any:
        """A value of the preset by dotted key."""
        node: Any = self.preset
        for part in path.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return default
            node = node[part]
        return node

    @property
    def title(self) -> str:
        return str(self.setting("method.title") or self.setting("method.key") or self.root.name)

    @property
    def steps(self) -> int:
        return int(max((points[-1][0] for points in self.series.values() if points), default=0))

    @property
    def seconds(self) -> float:
        """Time spent training; a resumed run counts each of its parts."""
        total, last = 0.0, 0.0
        for _, time in self.times:
            total += max(0.0, time - last) if time >= last else time
            last = time
        return total

    def summary(self) -> dict[str, Any]:
        """The page's content as numbers, for scripts."""
        return {
            "run": str(self.root),
            "title": self.title,
            "preset": self.setting("method.key"),
            "finished": self.finished,
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "parameters": self.parameters,
            "last": {name: points[-1][1] for name, points in self.series.items() if points},
            "evaluations": [
                {
                    name: r[name]
                    for name in ("task", "name", "samples", "metrics", "intervals", "chance")
                    if name in r
                }
                for r in self.results
            ],
            "missing": self.missing,
        }


def read_run(root: str | Path) -> RunRecord:
    """Everything a report needs of a run directory. Raises DataError when the directory is no run at all."""
    root = Path(root)
    known = ("preset.toml", "metrics.jsonl", "environment.json", "evaluation", "model")
    if not any((root / name).exists() for name in known):
        raise DataError(
            "is no run: none of " + ", ".join(known) + " is there"
            if root.is_dir()
            else "there is no such run",
            where=str(root),
            remedy="give the directory that vlm pretrain --output named",
        )
    record = RunRecord(root)
    _preset(record)
    _environment(record)
    _metrics(record)
    _results(record)
    _model(record)
    quarantine = root / "quarantine.jsonl"
    if quarantine.is_file():
        with quarantine.open("rb") as lines:
            record.refused = sum(1 for line in lines if line.strip())
    return record


def _preset(record: RunRecord) -> None:
    path = record.root / "preset.toml"
    try:
        record.preset_text = path.read_text(encoding="utf-8")
        record.preset = tomllib.loads(record.preset_text)
    except FileNotFoundError:
        record.missing.append("preset.toml is missing: the settings are unknown")
    except (OSError, ValueError) as error:
        record.missing.append(f"preset.toml cannot be read: {error}")


def _environment(record: RunRecord) -> None:
    try:
        value = json.loads((record.root / "environment.json").read_text(encoding="utf-8"))
        record.environment = value if isinstance(value, dict) else {}
    except FileNotFoundError:
        record.missing.append("environment.json is missing: the machine is unknown")
    except (OSError, ValueError) as error:
        record.missing.append(f"environment.json cannot be read: {error}")


def _metrics(record: RunRecord) -> None:
    """Numbers by name. A cut last line is left out; steps that were run again after a resume replace the old ones."""
    path = record.root / "metrics.jsonl"
    if not path.is_file():
        record.missing.append("metrics.jsonl is missing: no curves")
        return
    if path.stat().st_size > MAX_METRICS:
        record.missing.append(f"metrics.jsonl is larger than {MAX_METRICS} bytes: no curves")
        return
    damaged = 0
    with path.open("rb") as lines:
        for raw in lines:
            try:
                line = json.loads(raw)
            except ValueError:
                damaged += 1
                continue
            if not isinstance(line, dict) or not isinstance(line.get("step"), int | float):
                damaged += 1
                continue
            step = float(line["step"])
            for name, value in line.items():
                if name == "time" and isinstance(value, int | float):
                    record.times.append((step, float(value)))
                elif (
                    name not in ("step", "time")
                    and isinstance(value, int | float)
                    and not isinstance(value, bool)
                ):
                    record.series.setdefault(name, []).append((step, float(value)))
    if damaged:
        record.missing.append(f"{damaged} lines of metrics.jsonl cannot be read")
    if not record.series:
        record.missing.append("metrics.jsonl holds no numbers yet")


def _results(record: RunRecord) -> None:
    folder = record.root / "evaluation"
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            record.results.append(read_result(path))
        except DataError as error:
            record.missing.append(f"{path.name}: {error.message}")
    # What the model is for first, as the reader expects, its cost last; the others between, by name.
    record.results.sort(key=lambda r: (_ORDER.get(r["task"], 9), str(r.get("name", r["task"]))))


def _model(record: RunRecord) -> None:
    weights = record.root / "model" / "model.safetensors"
    record.finished = weights.is_file()
    if not record.finished:
        record.missing.append("model/ is missing: the run has not finished")
        return
    try:
        record.parameters = parameters_in(weights)
    except (OSError, ValueError, KeyError, TypeError) as error:
        record.missing.append(f"model.safetensors cannot be read: {error}")


def parameters_in(path: Path) -> int:
    """Numbers stored in a safetensors file, from its header alone. Raises ValueError for a header that is none."""
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        if size > MAX_HEADER:
            raise ValueError("the header is too large")
        header = json.loads(file.read(size))
    total = 0
    for name, entry in header.items():
        if name != "__metadata__":
            count = 1
            for side in entry["shape"]:
                count *= int(side)
            total += count
    return total
