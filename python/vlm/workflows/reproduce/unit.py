"""A unit: one arm trained with one seed and scored. Its key is a hash of all that its figures depend on."""

from __future__ import annotations

import fcntl
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vlm.config.errors import RunFailed
from vlm.config.writing import digest
from vlm.data.endless import Loader
from vlm.data.sources.base import Source
from vlm.data.sources.uri import open_source
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation import evaluate_in_memory
from vlm.evaluation.result import flatten
from vlm.models import Model, load_model
from vlm.training.companion_options import STAGE
from vlm.training.directory import RunDirectory
from vlm.training.preset import Stage, stages_of
from vlm.training.run import Run
from vlm.workflows.carve import Carving, evaluation_data
from vlm.workflows.reproduce.claim import Values, settled
from vlm.workflows.reproduce.fingerprint import fingerprint_of_code, fingerprint_of_data

SCHEMA = 1
"""Raised when the meaning of a unit changes, which makes every stored one stale."""

Note = Callable[[str], None]


@dataclass(frozen=True)
class Unit:
    """values: the preset, in which `start.model`, a part of it or a companion's source may be the name of a base.

    part: what of the training data it learns from; None: all. test, test_part: what is scored; test None: nothing is.
    bases: the units that make the models named in `values`, by name. phase: base, tune or seed, for the record alone.
    """

    arm: str
    phase: str
    seed: int
    values: Values
    part: Carving | None
    test: str | None
    test_part: Carving | None
    tasks: tuple[Any, ...]
    bases: dict[str, Unit] = field(default_factory=dict)
    factor: float | None = None

    @cached_property
    def stages(self) -> list[Stage]:
        return stages_of(settled(self.values)[1])

    @cached_property
    def key(self) -> str:
        """64 hex digits: the settled stages with every default, content of the data, code of the parts, keys of the bases."""
        stages = self.stages
        return digest(
            {
                "schema": SCHEMA,
                "stages": [stage.model_dump(mode="json") for stage in stages],
                "train": [_fingerprint(uri) for stage in stages for uri in sources_of(stage)],
                "part": _as_values(self.part),
                "test": None if self.test is None else _fingerprint(self.test),
                "test_part": _as_values(self.test_part),
                "tasks": [task.model_dump(mode="json") for task in self.tasks],
                "code": fingerprint_of_code([*stages, *self.tasks]),
                "bases": {name: base.key for name, base in self.bases.items()},
            }
        )

    def describe(self) -> str:
        factor = f", learning rate x {self.factor:g}" if self.phase == "tune" else ""
        return f"{self.arm} ({self.phase} {self.seed}{factor})"


class _PartRun(Run):
    """A run that learns from a part of its training data. Tokenizer and plan are those of the whole."""

    part: Carving | None = None

    def _loader(self, stage: Stage, model: Model, source: Source) -> Loader:
        return super()._loader(stage, model, self.part.of(source, stage.data.limits) if self.part else source)


def train_unit(
    unit: Unit, folder: Path, models: dict[str, Path], *, keep: bool = False, note: Note | None = None, progress: bool = False
) -> dict[str, Any]:
    """Train in `folder` (continuing what a killed process left there), score, return figures and seconds.

    models: directories of the bases by name. keep: leave the run there, as a base must. note, progress: what the run
    says while it goes; nothing without them. Raises RunFailed when a figure is not a number, and what training and
    evaluation raise.
    """
    started = time.monotonic()
    values = with_models(unit.values, models)
    preset, resolved = settled(values)
    directory = RunDirectory(folder)
    resumed = (folder / "environment.json").is_file()
    settings: dict[str, Any] = {"note": note or _silent, "progress": progress}
    if resumed:
        run = _PartRun(directory, preset, resolved, **settings)
    else:
        shutil.rmtree(folder, ignore_errors=True)
        run = _PartRun.begin(folder, preset, resolved, **settings)  # type: ignore[assignment]
    run.part = unit.part
    _share_cache(folder)
    finished = run.train()
    figures, intervals = score(unit, directory.model) if unit.test is not None else ({}, {})
    if not keep:
        shutil.rmtree(folder)
    return {
        "figures": figures,
        "intervals": intervals,
        "updates": finished.steps,
        "parameters": finished.parameters,
        "seconds": time.monotonic() - started,
        "resumed": resumed,
    }


def score(unit: Unit, directory: Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """`NAME.path` -> number for every figure of the unit's tasks on its test data; and each one's bootstrap interval.

    The interval is over the test samples, by concept where several share one: what one model's figure is worth. The
    verdict rests on the spread over seeds instead.
    """
    assert unit.test is not None
    stage = unit.stages[-1]
    data = evaluation_data(unit.test, stage.data, unit.test_part)
    results = evaluate_in_memory(load_model(directory), Tokenizer.load(directory), unit.tasks, data)
    figures = {name.replace("/", "."): value for result in results for name, value in result.flat().items()}
    wrong = [name for name, value in figures.items() if not math.isfinite(value)]
    if wrong:
        raise RunFailed(f"{wrong[0]} of {unit.describe()} is not a number", remedy="the run has diverged: lower optimizer.lr")
    bounds = {
        f"{result.name}.{name}".replace("/", "."): value for result in results for name, value in flatten(result.intervals)
    }
    intervals = {
        name: [bounds[f"{name}.lower"], bounds[f"{name}.upper"]] for name in figures if f"{name}.lower" in bounds
    }
    return figures, intervals


def with_models(values: Values, models: Mapping[str, Path]) -> Values:
    """The values with the directories of bases in place of their names."""
    out: Any = values
    for place, name in base_names(values).items():
        if name in models:
            out = _replaced(out, place, str(models[name]))
    return out


def base_names(values: Values) -> dict[tuple[str | int, ...], str]:
    """Where a preset names another model -> the name: `start.model`, every entry of `start.parts` and every companion's
    `source`, at the top level and in its stages. The model itself (`model`) and `stage:NAME` are no names."""
    found: dict[tuple[str | int, ...], str] = {}
    tables: list[tuple[tuple[str | int, ...], Any]] = [((), values)]
    tables += [(("stages", number), stage) for number, stage in enumerate(values.get("stages") or ())]
    for place, table in tables:
        start = _inside(table, "start")
        named: dict[tuple[str | int, ...], Any] = {("start", "model"): start.get("model")}
        named |= {("start", "parts", part): name for part, name in _inside(start, "parts").items()}
        companions = _inside(table, "companions")
        named |= {("companions", name, "source"): _inside(companions, name).get("source") for name in companions}
        for inner, name in named.items():
            if isinstance(name, str) and name not in ("model", "none") and not name.startswith(STAGE):
                found[*place, *inner] = name
    return found


def _inside(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A table in a table; an empty one where there is none, or where a stage takes it away."""
    value = table.get(key)
    return value if isinstance(value, Mapping) else {}


def _replaced(values: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """The values with another one at a place; nothing that is shared is changed."""
    if not place:
        return value
    out = list(values) if isinstance(values, list) else dict(values)
    out[place[0]] = _replaced(out[place[0]], place[1:], value)  # type: ignore[index]
    return out


def _share_cache(folder: Path) -> None:
    """Let embeddings of companions outlive the unit: `cache/` becomes a link to one folder of the whole store.

    The cache is keyed by weights and sample, so arms and seeds that share a teacher share its work.
    """
    shared, own = folder.parent.parent / "cache", folder / "cache"
    shared.mkdir(parents=True, exist_ok=True)
    if not own.exists():
        own.unlink(missing_ok=True)
        own.symlink_to(shared.resolve(), target_is_directory=True)


def is_made(folder: Path) -> bool:
    """Whether the run of a base is finished: its model is published last, by one rename."""
    return (folder / "model" / "model.safetensors").is_file()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time on the run of a unit; the lock ends with the process, however that ends."""
    path = folder.with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def sources_of(stage: Stage) -> list[str]:
    """The addresses that a stage learns from, each once."""
    parts = [part.source for part in stage.data.mixture.values()]
    return list(dict.fromkeys(parts)) or [stage.data.source]


@cache
def _fingerprint(uri: str) -> str:
    return fingerprint_of_data(open_source(uri))


def _as_values(part: Carving | None) -> Any:
    return None if part is None else {"by": list(part.by), "share": part.share, "held_out": part.held_out}


def _silent(text: str) -> None:
    return None
