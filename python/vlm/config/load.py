"""From the name of a preset to settled values, each with its origin.

`resolve` reads files and overrides and knows no schema; `validate` puts the result into an options class. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vlm.config.errors import PresetError
from vlm.config.files import SCHEMA, Migration, PresetFile, find, read_preset
from vlm.config.overrides import apply_overrides
from vlm.config.resolved import Resolved, dotted_name, merge_tables, refuse_leftovers
from vlm.config.tree import Node, merge

if TYPE_CHECKING:
    from vlm.config.options import Options

    S = TypeVar("S", bound=Options)

__all__ = ["DEFERRED", "Resolved", "dotted_name", "merge_tables", "resolve", "validate"]

DEFERRED = frozenset({"stages", "claim"})
"""Tables laid over the rest later (stages, the overrides of a claim), by `merge_tables`: a removal in them may concern what they
will be laid over."""


def resolve(
    name_or_path: str | Path,
    overrides: Sequence[str] = (),
    search: Sequence[Path] = (),
    *,
    schema: int = SCHEMA,
    migrations: dict[int, Migration] | None = None,
) -> Resolved:
    """A preset with everything that it extends and the overrides of the command line.

    name_or_path: a key (`clip-tiny`), a path that ends in `.toml`, or a run directory. search: directories of the
    user's presets, looked up before the packaged ones. Raises PresetError with file, line and column, or naming the
    chain of files for a cycle or a missing base.
    """
    reader = _Reader(tuple(search), schema, migrations)
    try:
        tree = reader.load(find(str(name_or_path), search), ())
        tree = apply_overrides(tree, overrides)
        refuse_leftovers(tree, DEFERRED)
        resolved = Resolved(tree, tuple(reader.files))
        assert isinstance(resolved.values, dict)  # made here, so that nothing later can find them too deep
    except RecursionError:
        raise PresetError("tables or lists are nested too deeply", where=str(name_or_path)) from None
    return resolved


class _Reader:
    def __init__(
        self, search: tuple[Path, ...], schema: int, migrations: dict[int, Migration] | None
    ) -> None:
        self.search, self.schema, self.migrations = search, schema, migrations
        self.files: list[PresetFile] = []

    def load(self, path: Path, chain: tuple[PresetFile, ...]) -> Node:
        file = read_preset(path, schema=self.schema, migrations=self.migrations)
        here = (*chain, file)
        tree = Node({})
        for name in file.extends:
            base = find(name, self.search, beside=path.parent, chain=file.extends_place)
            if any(base.resolve() == seen.path.resolve() for seen in here):
                names = " -> ".join([*(seen.label for seen in here), _label_in(here, base)])
                raise PresetError(f"presets extend each other in a circle: {names}", where=file.extends_place)
            try:
                tree = merge(tree, self.load(base, here))
            except PresetError as error:
                raise _through(error, file) from None
        if all(seen.path.resolve() != path.resolve() for seen in self.files):
            self.files.append(file)
        return merge(tree, file.tree)


def _label_in(files: Sequence[PresetFile], path: Path) -> str:
    """The label of the file among `files` that is `path`."""
    return next(file.label for file in files if file.path.resolve() == path.resolve())


def _through(error: PresetError, file: PresetFile) -> PresetError:
    """The error of a base, with a line that names the file that extends it."""
    line = f"extended by {file.extends_place}"
    if (error.remedy and line in error.remedy) or error.where == file.extends_place:
        return error
    return PresetError(
        error.message, where=error.where, remedy=f"{error.remedy}\n  {line}" if error.remedy else line
    )


def validate(resolved: Resolved, schema: type[S]) -> S:
    """The values as an instance of an options class. Raises one PresetError that names every problem."""
    from vlm.config.validation import validate as validated

    return validated(resolved, schema)
