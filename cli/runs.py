"""`vlm runs`: list and compare run directories. Reads `preset.toml`, `metrics.jsonl` and `environment.json`; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from vlm.cli.completion import addresses
from vlm.cli.output import echo_json, echo_result, log, table
from vlm.config.errors import DataError, RequestError, VlmError
from vlm.config.files import read_toml
from vlm.training.lock import is_locked

_json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")
_folder = click.Path(path_type=Path)

_DEPTH = 3
"""How many folders deep runs are looked for."""

_MACHINE = ("time", "perf/", "mem/")
"""Metrics that say something of the machine rather than of the model."""


@dataclass(frozen=True)
class RunSummary:
    """What a run directory says. metrics: name -> (last value, its step). problem: what could not be read."""

    path: Path
    preset: dict[str, Any]
    metrics: dict[str, tuple[float, int]]
    extremes: dict[str, tuple[float, float]]
    step: int
    seconds: float | None
    started: str | None
    finished: bool
    problem: str | None = None

    @property
    def key(self) -> str:
        """The preset's key."""
        method = self.preset.get("method")
        return str(method.get("key", "")) if isinstance(method, dict) else ""


@click.group()
def group() -> None:
    """List and compare runs."""


@group.command("list")
@click.argument("folders", nargs=-1, type=_folder, metavar="[DIR]...")
@_json
def list_(folders: Sequence[Path], as_json: bool) -> None:
    """List the runs in DIR [default: runs]; a DIR that is a run itself is listed too."""
    runs = [read_run(path) for path in find_runs(folders or (Path("runs"),))]
    for run in runs:
        if run.problem:
            log(f"warning: {run.problem}", fg="yellow")
    if as_json:
        echo_json([_to_json(run) for run in runs])
    elif runs:
        rows = [(str(r.path), r.key, str(r.step), _state(r), _clock(r.seconds), _headline(r)) for r in runs]
        echo_result(table(rows, ("RUN", "PRESET", "STEP", "STATE", "TIME", "LAST")))
    else:
        log("no runs here")


@group.command()
@click.argument("folders", nargs=-1, required=True, type=_folder, metavar="DIR...")
@click.option(
    "--metric",
    "names",
    multiple=True,
    metavar="NAME",
    help="Only metrics whose name begins so; may be repeated.",
)
@_json
def compare(folders: Sequence[Path], names: Sequence[str], as_json: bool) -> None:
    """Compare runs: the settings in which they differ, and the last value of each metric."""
    runs = [read_run(path) for path in find_runs(folders)]
    for run in runs:
        if run.problem:
            log(f"warning: {run.problem}", fg="yellow")
    for folder in folders:
        if not find_runs([folder]):
            raise DataError("is no run and holds none", where=str(folder), remedy="give the directory that vlm pretrain --output named")
    if len(runs) < 2:
        raise RequestError("a comparison needs at least two runs", where=", ".join(str(folder) for folder in folders))
    settings = differing_settings(runs)
    metrics = sorted({n for run in runs for n in run.metrics if not n.startswith(_MACHINE)})
    metrics = [name for name in metrics if not names or name.startswith(tuple(names))]
    if as_json:
        echo_json(
            {
                "runs": [_to_json(run) for run in runs],
                "settings": settings,
                "metrics": {name: [_metric(run, name) for run in runs] for name in metrics},
            }
        )
        return
    header = ("", *(str(run.path) for run in runs))
    rows = [(key, *(_written(value) for value in values)) for key, values in settings.items()]
    rows += [("step", *(str(run.step) for run in runs))]
    rows += [(name, *(_number(run.metrics.get(name, (None, 0))[0]) for run in runs)) for name in metrics]
    echo_result(table(rows, header))


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Run directories among and below `folders`, in order. Raises DataError for a folder that does not exist."""
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError("there is no such directory", where=str(folder))
        found += [path for path in _below(folder, _DEPTH) if path not in found]
    return found


def _below(folder: Path, depth: int) -> list[Path]:
    if (folder / "bundle.json").is_file():
        return []  # which has a preset.toml too: that of the run it was made from
    if (folder / "preset.toml").is_file():
        return [folder]
    if depth == 0:
        return []
    children = sorted(
        child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")
    )
    return [path for child in children for path in _below(child, depth - 1)]


def read_run(path: Path) -> RunSummary:
    """The summary of one run directory; what is missing or broken is left out and named in `problem`."""
    problems: list[str] = []
    preset: dict[str, Any] = {}
    try:
        preset, _ = read_toml(path / "preset.toml")
    except VlmError as error:
        problems.append(str(error))
    last, extremes, step, seconds, bad = _read_metrics(path / "metrics.jsonl")
    if bad:
        problems.append(
            f"{path / 'metrics.jsonl'}:{bad[0]}: not a JSON object"
            + (f" ({len(bad)} lines)" if bad[1:] else "")
        )
    started = None
    try:
        environment = json.loads((path / "environment.json").read_text("utf-8"))
        started = environment.get("started") if isinstance(environment, dict) else None
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{path / 'environment.json'}: {error}")
    finished = (path / "model").is_dir()
    return RunSummary(
        path, preset, last, extremes, step, seconds, started, finished, "; ".join(problems) or None
    )


def _read_metrics(
    path: Path,
) -> tuple[dict[str, tuple[float, int]], dict[str, tuple[float, float]], int, float | None, list[int]]:
    """Last value and (least, greatest) of each name, last step, seconds, and the numbers of broken lines.

    A last line without a newline was cut by a crash, or is being written: it is no problem and not read.
    """
    last: dict[str, tuple[float, int]] = {}
    extremes: dict[str, tuple[float, float]] = {}
    step, seconds = 0, None
    bad: list[int] = []
    if not path.is_file():
        return last, extremes, step, seconds, bad
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            if not raw.endswith(b"\n"):
                break
            try:
                line = json.loads(raw)
            except ValueError:
                line = None
            if not isinstance(line, dict):
                bad.append(number)
                continue
            step = line["step"] if isinstance(line.get("step"), int) else step
            seconds = line["time"] if isinstance(line.get("time"), int | float) else seconds
            for name, value in line.items():
                if name in ("step", "time") or isinstance(value, bool) or not isinstance(value, int | float):
                    continue
                last[name] = (value, step)
                if math.isfinite(value):
                    low, high = extremes.get(name, (value, value))
                    extremes[name] = (min(low, value), max(high, value))
    return last, extremes, step, seconds, bad


def differing_settings(runs: Sequence[RunSummary]) -> dict[str, list[Any]]:
    """Settings that are not the same in all runs: key -> value in each run, None where a run does not say it."""
    tables = [dict(addresses(run.preset)) for run in runs]
    keys = dict.fromkeys(key for values in tables for key in values)
    rows = {key: [values.get(key) for values in tables] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _metric(run: RunSummary, name: str) -> dict[str, Any] | None:
    if name not in run.metrics:
        return None
    value, step = run.metrics[name]
    low, high = run.extremes.get(name, (math.nan, math.nan))
    return {"last": value, "step": step, "min": low, "max": high}


def _to_json(run: RunSummary) -> dict[str, Any]:
    return {
        "path": str(run.path),
        "preset": run.key,
        "step": run.step,
        "state": _state(run),
        "seconds": run.seconds,
        "started": run.started,
        "metrics": {name: value for name, (value, _) in run.metrics.items()},
        "problem": run.problem,
    }


def _state(run: RunSummary) -> str:
    if is_locked(run.path):
        return "running"
    if run.finished:
        return "finished"
    checkpoints = run.path / "checkpoints"
    resumable = checkpoints.is_dir() and any(
        not child.name.startswith(".") for child in checkpoints.iterdir()
    )
    return "resumable" if resumable else "no checkpoint"


def _headline(run: RunSummary) -> str:
    """Up to three metrics of the model, evaluations first."""
    names = sorted(
        (n for n in run.metrics if not n.startswith(_MACHINE)), key=lambda n: (not n.startswith("eval/"), n)
    )
    return "  ".join(f"{name} {_number(run.metrics[name][0])}" for name in names[:3])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _written(value: Any) -> str:
    return "-" if value is None else str(value)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
