"""From a preset with a `[claim]` to the arms that are trained, and what is measured on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlm.config.errors import DataError, PresetError, RequestError
from vlm.config.load import Resolved, merge_tables, resolve, validate
from vlm.config.tree import DELETE, node_of
from vlm.data.sources.uri import open_source
from vlm.training.preset import AgainstOptions, ClaimOptions, Preset, load_preset, stages_of

BUILTIN = "builtin"
BUILTIN_TRAIN, BUILTIN_TEST = "scenes:?n=20000", "scenes:?n=1000&split=test"
REAL = "real"

Values = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """One side of a comparison: settled values of a preset, without claim and evaluation.

    seed_offset: added to every seed, for an arm that shall differ by nothing but chance.
    """

    name: str
    values: Values
    seed_offset: int = 0

    @property
    def rate(self) -> float:
        return settled(self.values)[0].optimizer.lr


@dataclass(frozen=True)
class Claim:
    """Everything that is needed to measure: arms (the method first, then the baseline), tasks, data, rule.

    data: `real` or `builtin`; train, test: addresses. tasks: the evaluation tasks that the figures come from.
    """

    key: str
    title: str
    options: ClaimOptions
    arms: tuple[Arm, ...]
    tasks: tuple[Any, ...]
    data: str
    train: str
    test: str
    bases: Mapping[str, Values] = field(default_factory=dict)

    @property
    def method(self) -> Arm:
        return self.arms[0]

    @property
    def baseline(self) -> Arm:
        return self.arms[1]

    def metric_of(self, arm: str) -> str:
        """The figure that is read of an arm."""
        other = self.options.baseline_metric
        return other if other is not None and arm == self.baseline.name else self.options.metric

    def check_data(self) -> None:
        """Raises DataError (exit code 3) that says how to go on where the claim's data are absent."""
        for uri in (self.train, self.test):
            try:
                open_source(uri)
            except DataError as error:
                raise DataError(
                    f"{self.key} is claimed on {self.train} and {self.test}, which cannot be read: {error.message}",
                    where=error.where,
                    remedy="bench/data/ says how these data are made; --data builtin measures on drawn scenes instead, "
                    "and labels the result so",
                ) from error


def settled(values: Values) -> tuple[Preset, Resolved]:
    """Values as a checked preset. Raises PresetError."""
    resolved = Resolved(node_of(values))
    preset = validate(resolved, Preset)
    stages_of(resolved)
    return preset, resolved


def claim_of(key: str, data: str = REAL) -> Claim:
    """The claim of a preset, its arms checked. Raises RequestError where it makes none, PresetError for a wrong arm."""
    preset, resolved = load_preset(key)
    options = preset.claim
    if options is None:
        raise RequestError(f"{key} makes no claim", where=resolved.name, remedy="add a [claim] table, or name another preset")
    train = options.data or preset.data.source
    test = options.test or preset.data.val
    if data == BUILTIN:
        train, test = BUILTIN_TRAIN, BUILTIN_TEST
    if test is None:
        raise RequestError(f"the claim of {key} names no test data", where=resolved.name, remedy="set claim.test")
    own, other = resolved.values, resolve(options.baseline).values
    arms = [
        _arm(preset.method.key, own, train, options.overrides),
        _arm(str(other.get("method", {}).get("key")), other, train, options.overrides, options.baseline_overrides),
    ]
    if arms[0].name == arms[1].name:  # an ablation, or another figure of the same model
        same = arms[0].values == arms[1].values and options.baseline_metric is not None
        arms[1] = Arm(f"{arms[1].name} ({options.baseline_metric if same else 'ablated'})", arms[1].values)
    for control in options.controls:
        values = own if control.preset is None else resolve(control.preset).values
        arms.append(_arm(control.name, values, train, options.overrides, control.overrides))
    for number, gate in enumerate(options.gates):
        if isinstance(gate.against, AgainstOptions):
            arms.append(_arm(gate_arm(number), own, train, options.overrides, gate.against.overrides))
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise RequestError(f"the claim of {key} names an arm twice: {', '.join(names)}", where=resolved.name)
    for number, gate in enumerate(options.gates):
        if isinstance(gate.against, str) and gate.against not in (*names, "baseline"):
            raise RequestError(
                f"gate {number} compares with {gate.against!r}, which is no arm",
                where=resolved.name,
                remedy=f"known: baseline, {', '.join(names)}",
            )
    for name in options.own_data:
        resolve(name)  # a preset, or PresetError says which are known
    bases = {
        name: _arm(name, resolve(name).values, None if name in options.own_data else train, table).values
        for name, table in options.bases.items()
    }
    return Claim(
        preset.method.key, preset.method.title, options, tuple(arms), _tasks(key, arms[0], own, options),
        data, train, test, bases,
    )  # fmt: skip


def gate_arm(number: int) -> str:
    return f"gate-{number}"


def trained_on(values: Values, train: str | None) -> Values:
    """A preset's values for a unit: on these training data, without claim and without evaluation of its own.

    Every source of a mixture becomes these data too: what a mixture mixes then is kinds of samples, not pictures.
    """
    values = {name: value for name, value in values.items() if name not in ("claim", "evaluation")}
    values["stages"] = [
        _reading({name: value for name, value in stage.items() if name != "evaluation"}, train) for stage in values.get("stages", [])
    ]
    if not values["stages"]:
        del values["stages"]
    values["data"] = {name: value for name, value in values.get("data", {}).items() if name != "val"}
    stages = values.get("stages", [])
    if train is not None and not (stages and all(_has_source(stage) for stage in stages)):
        values["data"].setdefault("source", train)
    return _reading(values, train)


def _has_source(table: Values) -> bool:
    return any(table.get("data", {}).get(name) for name in ("source", "mixture"))


def _reading(table: Values, train: str | None) -> Values:
    """A table, or one of a stage, whose data come from `train` wherever it says where they come from; None: as it is."""
    data = table.get("data")
    if train is None or not isinstance(data, Mapping):
        return table
    data = dict(data)
    if isinstance(data.get("mixture"), Mapping) and data["mixture"]:
        data.pop("source", None)
        data["mixture"] = {name: {**part, "source": train} for name, part in data["mixture"].items()}
    elif "source" in data and data["source"] != DELETE:
        data["source"] = train
    return {**table, "data": data}


def with_length(values: Values, share: float) -> Values:
    """The same preset for a share of its updates, in every stage."""
    return _changed(values, lambda table: _scaled(table, "train", {"steps": share, "epochs": share}))


def with_rate(values: Values, factor: float) -> Values:
    """The same preset with its learning rate times a factor, in every stage."""
    rate = settled(values)[0].optimizer.lr  # written out where the preset relies on the default
    values = merge_tables({"optimizer": {"lr": rate}}, values)
    return _changed(values, lambda table: _scaled(table, "optimizer", {"lr": factor}))


def with_seed(values: Values, seed: int) -> Values:
    return merge_tables(values, {"train": {"seed": seed}})


def _changed(values: Values, change: Any) -> Values:
    out = change(values)
    if "stages" in out:
        out = {**out, "stages": [change(stage) for stage in out["stages"]]}
    return out


def _scaled(table: Values, name: str, factors: Mapping[str, float]) -> Values:
    """The table with some numbers under `name` multiplied; counts stay whole, and those above 0 stay so."""
    inside = table.get(name)
    if not isinstance(inside, Mapping):
        return table
    inside = dict(inside)
    for key, factor in factors.items():
        value = inside.get(key)
        if value is not None:
            whole = isinstance(value, int) and key == "steps"
            inside[key] = max(min(1, value), round(value * factor)) if whole else value * factor
    return {**table, name: inside}


def _arm(name: str, values: Values, train: str | None, *overrides: Values) -> Arm:
    values = {key: value for key, value in values.items() if key != "claim"}
    for table in overrides:
        values = merge_tables(values, table)
    values = trained_on(values, train)
    try:
        settled(values)
    except PresetError as error:
        said = f"arm {name!r} of the claim is no preset that can train: {error.message}"
        raise PresetError(said, where=error.where, remedy=error.remedy) from error
    return Arm(name, values)


def _tasks(key: str, arm: Arm, own: Values, options: ClaimOptions) -> tuple[Any, ...]:
    """The preset's evaluation tasks that the claim's metrics name. Raises RequestError for a metric of no task."""
    merged = merge_tables(own, options.overrides)
    evaluation = merged.get("evaluation", {})
    known = settled({**arm.values, "evaluation": evaluation})[0].evaluation.tasks
    wanted: list[Any] = []
    for metric in filter(None, (options.metric, options.baseline_metric, *(gate.metric for gate in options.gates))):
        found = [task for task in known if metric.startswith(f"{task.title}.")]
        if not found:
            raise RequestError(
                f"the claim of {key} reads {metric!r}, which no evaluation task gives",
                remedy=f"tasks of the preset: {', '.join(task.title for task in known) or 'none'}",
            )
        task = max(found, key=lambda t: len(t.title))
        if task not in wanted:
            wanted.append(task)
    return tuple(wanted)


def presets_with_claims(keys: Sequence[str]) -> list[str]:
    """Those of the keys whose preset makes a claim, in order."""
    return [key for key in keys if resolve(key).values.get("claim")]
