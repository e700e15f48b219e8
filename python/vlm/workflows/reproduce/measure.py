"""A whole claim: both arms tuned on a dev part, then paired seeds on the test data, then the verdict.

1. Tuning. Each arm is trained for `tune.share` of its updates with its learning rate times each of `tune.factors`, on the
   training data without the dev part (a share of the concepts, by hash), and scored on the dev part. The best factor wins;
   of equal ones the one nearest to 1. The test data are not read.
2. Measuring. Seeds 0 to N - 1, each with every arm: the same data, the same order, the same draws. Scored on `claim.test`.
3. Judging. Mean paired difference, 95 % t-interval over seeds, the rule of `statistics.verdict`; then the gates.

Bases (a teacher, a model to start from) that a preset names by key are trained once, on the training data without the dev
part, so that one base serves tuning and measuring and has seen nothing that either is scored on. A base is scored on
nothing itself, so that claims with other tasks share it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from vlm.config.errors import RequestError
from vlm.config.load import resolve
from vlm.training.preset import GateOptions
from vlm.workflows.bases import units_of
from vlm.workflows.carve import Carving
from vlm.workflows.reproduce.claim import (
    Arm,
    Claim,
    Values,
    gate_arm,
    trained_on,
    with_length,
    with_rate,
    with_seed,
)
from vlm.workflows.reproduce.provenance import commit
from vlm.workflows.reproduce.statistics import CONFIDENCE, Paired
from vlm.workflows.reproduce.unit import Unit, is_made
from vlm.workflows.reproduce.workspace import Workspace

TUNING_SEED = 1_000_003
"""Apart from every seed that is measured."""
BASE_SEED = 2_000_003
TIER_SECONDS = {"S": 4 * 60, "M": 12 * 60, "L": 45 * 60}


@dataclass(frozen=True)
class Measurement:
    """figures: arm -> its metric by seed. factors: arm -> the chosen one. dev: arm -> figure of every factor tried."""

    claim: Claim
    seeds: int
    figures: dict[str, list[float]]
    factors: dict[str, float]
    dev: dict[str, dict[str, float]]
    units: list[dict[str, Any]]
    tuning_seconds: float = 0.0
    gates: list[dict[str, Any]] = field(default_factory=list)

    @property
    def difference(self) -> Paired:
        claim = self.claim
        return Paired.of(self.figures[claim.method.name], self.figures[claim.baseline.name], claim.options.direction)

    def to_json(self, command: str) -> dict[str, Any]:
        """What `vlm reproduce --json` prints and the results keep."""
        claim, difference = self.claim, self.difference
        found = difference.verdict(claim.options.margin)
        missed = [gate for gate in self.gates if not gate["held"]]
        seconds = self.tuning_seconds + sum(unit["seconds"] for unit in self.units)
        return {
            "key": claim.key,
            "title": claim.title,
            "verdict": "fails" if missed and found == "holds" else found,
            "metric": claim.options.metric,
            **({} if claim.options.baseline_metric is None else {"baseline_metric": claim.options.baseline_metric}),
            "direction": claim.options.direction,
            "margin": claim.options.margin,
            "method": self._side(claim.method),
            "baseline": self._side(claim.baseline),
            "difference": {
                "mean": difference.mean,
                "lower": difference.lower,
                "upper": difference.upper,
                "confidence": CONFIDENCE,
                "pairs": difference.pairs,
            },
            "controls": [self._side(arm) for arm in claim.arms[2:]],
            "gates": self.gates,
            "seeds": list(range(self.seeds)),
            "data": claim.data,
            "train": claim.train,
            "test": claim.test,
            "tier": claim.options.tier,
            "seconds": seconds,
            "tier_seconds": TIER_SECONDS[claim.options.tier],
            "command": command,
            "commit": commit(),
            "measured": sorted({str(unit["commit"]) for unit in self.units}),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "units": [unit["key"] for unit in self.units],
        }

    def _side(self, arm: Arm) -> dict[str, Any]:
        """at_edge: the grid's first or last factor was the best, so that a rate beyond it might be better still."""
        values, tried = self.figures[arm.name], self.claim.options.tune.factors
        return {
            "name": arm.name,
            "mean": fmean(values),
            "values": values,
            "lr": arm.rate * self.factors[arm.name],
            "tuning": self.dev.get(arm.name, {}),
            "at_edge": len(tried) > 1 and self.factors[arm.name] in (min(tried), max(tried)),
        }


class Measure:
    """The units of a claim in their order, and what follows from them."""

    def __init__(self, claim: Claim, workspace: Workspace, seeds: int | None = None, *, claim_name: str | None = None) -> None:
        self.claim = claim
        self.workspace = workspace
        self.seeds = claim.options.seeds if seeds is None else seeds
        self.name = claim_name or claim.key
        if self.seeds < 1:
            raise RequestError(f"{self.seeds} seeds, expected at least 1")
        tune = claim.options.tune
        self.dev = Carving(tune.by, tune.dev, held_out=True)
        self.rest = Carving(tune.by, tune.dev, held_out=False)

    def run(self) -> Measurement:
        """Every unit, then the judgement. Raises BudgetSpent with everything finished stored."""
        self.claim.check_data()
        factors: dict[str, float] = {}
        dev: dict[str, dict[str, float]] = {}
        tuning_seconds = 0.0
        for arm in self.claim.arms:
            factors[arm.name], dev[arm.name], seconds = self._tuned(arm)
            tuning_seconds += seconds
        records: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in self.claim.arms}
        for seed in range(self.seeds):
            for arm in self.claim.arms:
                records[arm.name].append(self._do(self.seed_unit(arm, seed, factors[arm.name])))
        return Measurement(
            self.claim,
            self.seeds,
            {name: [self._figure(one, self.claim.metric_of(name)) for one in own] for name, own in records.items()},
            factors,
            dev,
            [one for own in records.values() for one in own],
            tuning_seconds,
            [self._gate(number, gate, records) for number, gate in enumerate(self.claim.options.gates)],
        )

    def plan(self) -> list[tuple[Unit, str]]:
        """The units that are known before anything is trained, with their state; measuring ones at factor 1 until tuned."""
        self.claim.check_data()
        units = [unit for arm in self.claim.arms for unit in self.tuning_units(arm)]
        for seed in range(self.seeds):
            for arm in self.claim.arms:
                units.append(self.seed_unit(arm, seed, self.known_factor(arm)))
        bases = {base.key: base for unit in units for base in _all_bases(unit)}
        told: dict[str, Unit] = {}
        for unit in [*bases.values(), *units]:
            told.setdefault(unit.key, unit)  # two arms may read two figures of one unit
        return [(unit, self._state(unit)) for unit in told.values()]

    def _state(self, unit: Unit) -> str:
        if unit.phase == "base":
            return "stored" if is_made(self.workspace.folder(unit)) else "to do"
        return self.workspace.state(unit)

    def tuning_units(self, arm: Arm) -> list[Unit]:
        """One a factor; none where there is nothing to choose."""
        tune = self.claim.options.tune
        if len(tune.factors) < 2:
            return []
        short = with_length(arm.values, tune.share)
        return [
            self._unit(
                arm.name, "tune", with_seed(with_rate(short, factor), TUNING_SEED), TUNING_SEED,
                part=self.rest, test=self.claim.train, test_part=self.dev, factor=factor,
            )
            for factor in tune.factors
        ]

    def seed_unit(self, arm: Arm, seed: int, factor: float) -> Unit:
        seed += arm.seed_offset
        return self._unit(
            arm.name, "seed", with_seed(with_rate(arm.values, factor), seed), seed,
            part=None, test=self.claim.test, test_part=None, factor=factor,
        )  # fmt: skip

    def _unit(
        self, name: str, phase: str, values: Values, seed: int, *, part: Carving | None, test: str,
        test_part: Carving | None, factor: float | None,
    ) -> Unit:  # fmt: skip
        bases = units_of(values, self._base_values, self._make_base)
        return Unit(name, phase, seed, values, part, test, test_part, self.claim.tasks, bases, factor)

    def _base_values(self, key: str) -> Values:
        train = None if key in self.claim.options.own_data else self.claim.train
        values = self.claim.bases.get(key) or trained_on(resolve(key).values, train)
        return with_seed(values, BASE_SEED)

    def _make_base(self, key: str, values: Values, bases: dict[str, Unit]) -> Unit:
        return Unit(key, "base", BASE_SEED, values, self.rest, None, None, (), bases)

    def _tuned(self, arm: Arm) -> tuple[float, dict[str, float], float]:
        """The chosen factor, the dev figure of each, and the seconds that choosing took."""
        units = self.tuning_units(arm)
        if not units:
            return self.claim.options.tune.factors[0], {}, 0.0
        records = [(unit.factor or 1.0, self._do(unit)) for unit in units]
        dev = {factor: self._figure(record, self.claim.metric_of(arm.name)) for factor, record in records}
        chosen = best_factor(dev, self.claim.options.direction)
        return chosen, {f"{factor:g}": value for factor, value in dev.items()}, sum(record["seconds"] for _, record in records)

    def known_factor(self, arm: Arm) -> float:
        """The tuned factor if all of tuning is stored, else the one nearest to 1."""
        dev = {}
        for unit in self.tuning_units(arm):
            stored = self.workspace.results.find(unit.key)
            if stored is None:
                return min(self.claim.options.tune.factors, key=_distance)
            dev[unit.factor] = self._figure(stored, self.claim.metric_of(arm.name))
        return best_factor(dev, self.claim.options.direction) if dev else self.claim.options.tune.factors[0]  # type: ignore[arg-type]

    def _do(self, unit: Unit) -> dict[str, Any]:
        share = TIER_SECONDS[self.claim.options.tier] / (len(self.claim.arms) * (self.seeds + 1))
        return self.workspace.unit(self.name, unit, expected=share)

    def _figure(self, record: dict[str, Any], metric: str) -> float:
        try:
            return float(record["figures"][metric])
        except KeyError:
            raise RequestError(
                f"the claim of {self.claim.key} reads {metric!r}, which its task does not give",
                remedy=f"it gives: {', '.join(record['figures'])}",
            ) from None

    def _gate(self, number: int, gate: GateOptions, records: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
        """Whether a gate holds, by the means over seeds."""
        other = gate_arm(number) if not isinstance(gate.against, str | None) else gate.against or "baseline"
        other = self.claim.baseline.name if other == "baseline" else other
        mean = fmean(self._figure(one, gate.metric) for one in records[self.claim.method.name])
        rise = mean - fmean(self._figure(one, gate.metric) for one in records[other])
        return {"metric": gate.metric, "mean": mean, "against": other, "rise": rise, "held": gate_holds(gate, mean, rise)}


def gate_holds(gate: GateOptions, mean: float, rise: float) -> bool:
    """mean: of the method; rise: that minus the mean of the arm it is compared with."""
    conditions = (
        (gate.above, lambda bound: mean > bound),
        (gate.below, lambda bound: mean < bound),
        (gate.rises_by, lambda bound: rise >= bound),
        (gate.falls_by, lambda bound: -rise >= bound),
        (gate.rises_less_than, lambda bound: rise < bound),
        (gate.falls_less_than, lambda bound: -rise < bound),
    )
    return all(holds(bound) for bound, holds in conditions if bound is not None)


def best_factor(dev: dict[float, float], direction: str) -> float:
    """The factor of the best figure; of equal ones the nearest to 1."""
    sign = 1.0 if direction == "higher" else -1.0
    return max(dev, key=lambda factor: (sign * dev[factor], -_distance(factor)))


def _distance(factor: float) -> float:
    return abs(math.log(factor))


def _all_bases(unit: Unit) -> Sequence[Unit]:
    return [base for own in unit.bases.values() for base in (*_all_bases(own), own)]
