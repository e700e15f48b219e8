"""Bases: presets that another preset names as models (to start from, as a part, as a teacher). Each is trained once.

    FOLDER/KEY-HASH/    the run of a base; HASH depends on its settled stages, its data, the code and its own bases

A directory of that name comes before a preset of that key. `vlm reproduce` makes the bases of a claim by the same units,
with the claim's settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from vlm.config.catalogue import list_presets
from vlm.config.errors import RequestError
from vlm.config.load import Resolved, resolve
from vlm.config.tree import Node
from vlm.training.directory import RunDirectory
from vlm.training.plan import Plan
from vlm.training.rehearsal import plans_of, write_stand_in
from vlm.training.run import Run
from vlm.workflows.reproduce.claim import Values, settled, trained_on
from vlm.workflows.reproduce.unit import Note, Unit, base_names, is_made, locked, train_unit, with_models

FOLDER = Path("runs/bases")
Make = Callable[[str, Values, dict[str, Unit]], Unit]
"""(key, values of the preset, its own bases) -> the unit that makes it."""


def named_bases(values: Values) -> list[str]:
    """Keys of presets that the values name as models; a directory of that name is no base."""
    names = {name for name in base_names(values).values() if not Path(name).exists()}
    return sorted(names & {entry.key for entry in list_presets()}) if names else []


def units_of(values: Values, values_of: Callable[[str], Values], make: Make, above: tuple[str, ...] = ()) -> dict[str, Unit]:
    """The units of the bases that the values name, by key. Raises RequestError for bases that need each other."""
    return {key: unit_of(key, values_of, make, above) for key in named_bases(values)}


def unit_of(key: str, values_of: Callable[[str], Values], make: Make, above: tuple[str, ...] = ()) -> Unit:
    """The unit that makes one base. values_of: a preset's key -> its values. above: bases that need it."""
    if key in above:
        raise RequestError(f"bases need each other: {' -> '.join([*above, key])}")
    values = values_of(key)
    return make(key, values, units_of(values, values_of, make, (*above, key)))


def own_units(values: Values) -> dict[str, Unit]:
    """The bases of a preset that is about to be trained, each with its own settings and data, and scored on nothing."""
    return units_of(values, _own_values, _own_unit)


def _own_values(key: str) -> Values:
    values = resolve(key).values
    return trained_on(values, values.get("data", {}).get("source"))


def _own_unit(key: str, values: Values, bases: dict[str, Unit]) -> Unit:
    seed = settled(values)[0].train.seed
    return Unit(key, "base", seed, values, None, None, None, (), bases)


def with_bases(resolved: Resolved, models: Mapping[str, Path]) -> Resolved:
    """A resolved preset with the directories of bases in place of their keys; origins stay."""
    tree = resolved.tree
    for place, name in base_names(resolved.values).items():
        if name in models:
            tree = _replaced(tree, place, str(models[name]))
    return Resolved(tree, resolved.files)


def _replaced(node: Node, place: tuple[str | int, ...], value: str) -> Node:
    if not place:
        return Node(value, node.origin)
    head, rest = place[0], place[1:]
    if isinstance(node.value, list):
        return Node([_replaced(one, rest, value) if at == head else one for at, one in enumerate(node.value)], node.origin)
    return Node({key: _replaced(one, rest, value) if key == head else one for key, one in node.value.items()}, node.origin)


@dataclass(frozen=True)
class BaseStore:
    """Where bases are kept. note, progress: what is said while one is trained."""

    folder: Path = FOLDER
    note: Note = print
    progress: bool = False

    def place(self, unit: Unit) -> Path:
        """The run directory of a base."""
        return self.folder / f"{unit.arm.replace('/', '-')}-{unit.key[:12]}"

    def ready(self, units: Mapping[str, Unit]) -> dict[str, Path]:
        """The directories of bases, by key: found, or trained now; a base that was interrupted goes on."""
        return {key: self._one(unit) for key, unit in units.items()}

    def _one(self, unit: Unit) -> Path:
        place = self.place(unit)
        if is_made(place):
            return place
        models = self.ready(unit.bases)
        with locked(place):
            if not is_made(place):  # another process may have made it while we waited
                self.note(f"base {unit.arm}: trained once, kept in {place}")
                made = train_unit(unit, place, models, keep=True, note=self._tell(unit), progress=self.progress)
                self.note(f"base {unit.arm}: done in {made['seconds']:.0f} s")
        return place

    def _tell(self, unit: Unit) -> Note:
        return lambda text: self.note(f"base {unit.arm}: {text}")

    def rehearsed(self, units: Mapping[str, Unit], folder: Path) -> list[PlannedBase]:
        """What `ready` would do, the bases of bases first. Stand-ins for models that are not there yet go to `folder`."""
        done: dict[str, PlannedBase] = {}
        self._rehearse(units, folder, done)
        return list(done.values())

    def _rehearse(self, units: Mapping[str, Unit], folder: Path, done: dict[str, PlannedBase]) -> None:
        for key, unit in units.items():
            if key in done:
                continue
            place = self.place(unit)
            if is_made(place):
                done[key] = PlannedBase(key, place, place, None)
                continue
            self._rehearse(unit.bases, folder, done)
            preset, resolved = settled(with_models(unit.values, {name: done[name].model for name in unit.bases}))
            run = Run(RunDirectory(folder / key.replace("/", "-")), preset, resolved, note=lambda text: None)
            plans = plans_of(run, str(place))
            write_stand_in(run)
            done[key] = PlannedBase(key, place, run.directory.root, plans)


@dataclass(frozen=True)
class PlannedBase:
    """A base of a dry run. place: where it is or would be kept; model: what stands for it now; plans: None if it is there."""

    key: str
    place: Path
    model: Path
    plans: list[Plan] | None

    @property
    def seconds(self) -> float:
        """What training it would still take."""
        return sum(plan.seconds for plan in self.plans or ())
