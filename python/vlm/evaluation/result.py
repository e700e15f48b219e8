"""Result: what a task found, with its interval, its chance level and what it was measured on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm import __version__
from vlm.config.errors import DataError, GateFailed, RequestError, RunFailed
from vlm.evaluation.bootstrap import Estimate

SCHEMA = 1
MAX_RESULT = 256 * 2**20

Tree = Mapping[str, Any]
"""Numbers under names, nested: {"image_to_text": {"r@1": 31.2}} or {"top1": 31.2}."""


def flatten(tree: Tree, prefix: str = "") -> Iterator[tuple[str, float]]:
    """("image_to_text/r@1", 31.2) for every number of the tree."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", float(value)


def figures(
    names: Sequence[str], estimate: Estimate, scale: float = 1.0
) -> tuple[dict[str, float], dict[str, Any]]:
    """The `metrics` and `intervals` of one estimate, rounded to 6 decimals."""
    values, intervals = {}, {}
    for k, name in enumerate(names):
        values[name] = round(float(estimate.value[k]) * scale, 6)
        intervals[name] = {
            "lower": round(float(estimate.lower[k]) * scale, 6),
            "upper": round(float(estimate.upper[k]) * scale, 6),
        }
    return values, intervals


@dataclass(frozen=True)
class Result:
    """metrics: numbers; intervals: {"lower", "upper"} under the same names; chance: what guessing would reach.

    details: further findings (confusions, per-class figures, counts). examples: pictures and texts for a report.
    data, model: what was measured on what, with hashes. bad: samples that could not be read.
    """

    task: str
    name: str
    samples: int
    metrics: dict[str, Any]
    intervals: dict[str, Any]
    chance: dict[str, Any]
    details: dict[str, Any] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    bad: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """`NAME/image_to_text/r@1` -> number, as metrics.jsonl records them behind `eval/`."""
        return {f"{self.name}/{path}": value for path, value in flatten(self.metrics)}

    def as_json(self, *, examples: bool = True) -> dict[str, Any]:
        """The object that `vlm evaluate --json` prints."""
        out: dict[str, Any] = {
            "schema": SCHEMA,
            "task": self.task,
            "name": self.name,
            "samples": self.samples,
            "metrics": self.metrics,
            "intervals": self.intervals,
            "chance": self.chance,
            "details": self.details,
            "data": self.data,
            "model": self.model,
            "bad": self.bad,
            "options": self.options,
            "vlm": __version__,
        }
        if examples and self.examples:
            out["examples"] = self.examples
        return out


def write_text(path: Path, text: str) -> None:
    """Complete or absent: written beside its place, then renamed. Raises RunFailed naming the path."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """A JSON value as one line. Raises RunFailed naming the path."""
    write_text(path, json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def save_results(results: Sequence[Result], run: str | Path) -> list[Path]:
    """Store results in a run, `RUN/evaluation/NAME.json`, where `vlm report` finds them."""
    paths = []
    for result in results:
        safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in result.name)
        paths.append(Path(run) / "evaluation" / f"{safe}.json")
        write_json(paths[-1], result.as_json())
    return paths


def read_result(path: Path) -> dict[str, Any]:
    """One stored result. Raises DataError naming the file when it is none."""
    try:
        if path.stat().st_size > MAX_RESULT:
            raise DataError(f"larger than {MAX_RESULT} bytes", where=str(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict) or not isinstance(value.get("metrics"), dict) or "task" not in value:
        raise DataError(
            "is no evaluation result",
            where=str(path),
            remedy="expected what `vlm evaluate --output FILE` writes",
        )
    return value


@dataclass(frozen=True)
class Gate:
    """A condition on a metric: `image_to_text/r@1>=20`, also written with dots; `lower:` asks the lower bound."""

    metric: str
    sign: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Raises RequestError that says what was expected."""
        for sign in (">=", "<="):
            metric, found, bound = text.partition(sign)
            if found:
                try:
                    return cls(metric.strip(), sign, float(bound))
                except ValueError:
                    break
        raise RequestError(
            f"{text!r} is no gate",
            remedy='expected METRIC>=NUMBER or METRIC<=NUMBER, for example "image_to_text/r@1>=20"',
        )

    def check(self, result: Result) -> None:
        """Raises GateFailed when the result misses the bound, RequestError for an unknown metric."""
        bounds = {
            name.removesuffix("/lower"): v for name, v in flatten(result.intervals) if name.endswith("/lower")
        }
        wants_lower = self.metric.startswith("lower:")
        known = bounds if wants_lower else dict(flatten(result.metrics))
        name = self.metric.removeprefix("lower:")
        dotted = {key.replace("/", "."): key for key in known}
        key = name if name in known else dotted.get(name)
        if key is None:
            raise RequestError(f"the result has no metric {name!r}", remedy=f"it has: {', '.join(known)}")
        value = known[key]
        held = value >= self.bound if self.sign == ">=" else value <= self.bound
        if not held:
            raise GateFailed(
                f"gate missed: {self.metric} is {value:g}, wanted {self.sign} {self.bound:g}",
                where=result.name,
            )
