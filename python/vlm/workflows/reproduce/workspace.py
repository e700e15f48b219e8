"""Where units are made: runs under the store, finished ones in the results; each unit once, whoever asks first.

    STORE/units/KEY/    a run that is not finished; removed when its figures are stored
    STORE/bases/KEY/    finished models that others start from or learn from, by content
    STORE/cache/        embeddings of companions
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.workflows.reproduce.provenance import commit, machine
from vlm.workflows.reproduce.store import Results
from vlm.workflows.reproduce.unit import Note, Unit, is_made, locked, train_unit


class BudgetSpent(Exception):
    """The next unit would not end in time; everything finished so far is stored."""


@dataclass
class Workspace:
    """store, results: folders. command: what is recorded as the way to get these figures. note: told of progress.

    deadline: `time.monotonic()` before which the next unit must be expected to end; None: no limit.
    """

    store: Path
    results: Results
    command: str
    note: Note = print
    deadline: float | None = None
    trained: int = 0
    _spent: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        commit()  # of the code as it is loaded now, whatever happens to the files while units run

    def folder(self, unit: Unit) -> Path:
        return self.store / ("bases" if unit.phase == "base" else "units") / unit.key[:24]

    def state(self, unit: Unit) -> str:
        """`stored`, `begun` or `to do`."""
        if self.results.find(unit.key) is not None:
            return "stored"
        return "begun" if (self.folder(unit) / "environment.json").is_file() else "to do"

    def unit(self, claim: str, unit: Unit, expected: float | None = None) -> dict[str, Any]:
        """The record of a unit: stored before, or trained now. expected: seconds, where no unit of its kind says better.

        Raises BudgetSpent instead of beginning what would not end before the deadline.
        """
        stored = self._stored(claim, unit)
        if stored is not None:
            return stored
        self._check_budget(claim, unit, expected)
        models = {name: self.base(claim, base) for name, base in unit.bases.items()}
        with locked(self.folder(unit)):
            stored = self._stored(claim, unit)  # another process may have finished it while we waited
            if stored is not None:
                return stored
            record = self._train(claim, unit, models)
            self.results.add_unit(claim, record)
            return record

    def base(self, claim: str, unit: Unit) -> Path:
        """The model directory of a base, trained if the store does not hold it; its figures are stored too."""
        folder = self.folder(unit)
        models = {name: self.base(claim, base) for name, base in unit.bases.items()}
        with locked(self.folder(unit)):
            if not is_made(folder):
                self._check_budget(claim, unit, None)
                self.results.add_unit(claim, self._train(claim, unit, models))
        return folder / "model"

    def _stored(self, claim: str, unit: Unit) -> dict[str, Any] | None:
        own = self.results.read(claim).units.get(unit.key)
        if own is not None:
            return own
        found = self.results.find(unit.key)
        if found is not None:
            found = {**found, "phase": unit.phase, "arm": unit.arm}
            self.results.add_unit(claim, found)
            self.note(f"{unit.describe()}: measured for another claim")
        return found

    def _train(self, claim: str, unit: Unit, models: dict[str, Path]) -> dict[str, Any]:
        self.note(f"{unit.describe()}: training")
        made = train_unit(unit, self.folder(unit), models, keep=unit.phase == "base")
        self.trained += 1
        self._spent.setdefault((unit.phase, unit.arm), []).append(made["seconds"])
        self.note(f"{unit.describe()}: done in {made['seconds']:.0f} s")
        return {
            "key": unit.key,
            "arm": unit.arm,
            "phase": unit.phase,
            "seed": unit.seed,
            "factor": unit.factor,
            "test": unit.test,
            **made,
            "command": self.command,
            "commit": commit(),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": machine(),
        }

    def expected(self, claim: str, unit: Unit) -> float | None:
        """Seconds of units of this arm and phase: of this process, else of the stored ones; None where there is none."""
        times = self._spent.get((unit.phase, unit.arm)) or [
            one["seconds"]
            for one in self.results.read(claim).units.values()
            if (one["phase"], one["arm"]) == (unit.phase, unit.arm)
        ]
        return max(times) if times else None

    def _check_budget(self, claim: str, unit: Unit, fallback: float | None) -> None:
        if self.deadline is None:
            return
        seconds = self.expected(claim, unit) or fallback or 0.0
        if self.clock() + seconds > self.deadline:
            raise BudgetSpent(f"{unit.describe()} would take about {seconds:.0f} s more than the budget leaves")
