"""Values with their origins, and how one preset is laid over another.

The rules, tested in tests/config/test_tree.py:

- tables merge key by key; anything else replaces what the base had;
- lists whose entries are all tables with a `name` merge by name: an entry of the same name is merged into the base's,
  a new name is appended, `{name = "x", remove = true}` removes; a list that names every entry of the base decides the
  order, so that a stage can go between two; every other list replaces, and an empty list empties;
- the value `"!delete"` removes a key that the base set;
- a table that says another `kind` than its base starts anew: the base's keys belong to the other kind and are dropped
  (the `name` of a list entry stays). A base table that leaves `kind` to its default cannot be recognised: its keys stay,
  and validation names those that do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from vlm.config.positions import Path, Position

DELETE = "!delete"


@dataclass(frozen=True)
class Origin:
    """Where a value was set: in a file, or on the command line (`file` is then None)."""

    file: str | None
    line: int = 1
    column: int = 1
    value_line: int = 1
    value_column: int = 1
    label: str = ""
    """Short form for provenance comments: `presets/base/x.toml`, or the override's key."""

    @classmethod
    def of_override(cls, key: str) -> Origin:
        return cls(None, label=key)

    @classmethod
    def of_file(cls, file: str, label: str, position: Position | None) -> Origin:
        if position is None:
            return cls(file, label=label)
        return cls(file, position.line, position.column, position.value_line, position.value_column, label)

    @property
    def key_place(self) -> str:
        """`file:line:column` of the key, or `command line: key`."""
        return f"{self.file}:{self.line}:{self.column}" if self.file else f"command line: {self.label}"

    @property
    def value_place(self) -> str:
        """`file:line:column` of the value, or `command line: key`."""
        return f"{self.file}:{self.value_line}:{self.value_column}" if self.file else self.key_place

    def __str__(self) -> str:
        return f"{self.label or self.file}:{self.line}" if self.file else f"the command line ({self.label})"


@dataclass(frozen=True)
class Node:
    """A value: a table (dict of nodes), a list (of nodes) or a plain TOML value; and where it was set."""

    value: Any
    origin: Origin | None = field(default=None, compare=False)

    @property
    def is_table(self) -> bool:
        return isinstance(self.value, dict)

    @property
    def is_list(self) -> bool:
        return isinstance(self.value, list)

    def plain(self) -> Any:
        """The value without origins, all containers new."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, path: Path = ()) -> Iterator[tuple[Path, Node]]:
        """This node and all below it, with their paths."""
        yield path, self
        if isinstance(self.value, dict):
            for key, node in self.value.items():
                yield from node.walk((*path, key))
        elif isinstance(self.value, list):
            for index, node in enumerate(self.value):
                yield from node.walk((*path, index))

    def find(self, path: Path) -> Node | None:
        """The node at `path`, or None."""
        node = self
        for part in path:
            inside = node.value
            is_entry = isinstance(inside, list) and isinstance(part, int) and part < len(inside)
            is_key = isinstance(inside, dict) and part in inside
            if not (is_entry or is_key):
                return None
            node = inside[part]
        return node


def node_of(
    value: Any, positions: dict[Path, Position] | None = None, file: str = "", label: str = ""
) -> Node:
    """A plain value as a tree. Without positions the nodes have no origin.

    A path without a position of its own (made by a migration) takes the nearest one above it.
    """

    def build(value: Any, path: Path, above: Position | None) -> Node:
        position = above if positions is None else positions.get(path, above)
        origin = None if positions is None else Origin.of_file(file, label, position)
        if isinstance(value, dict):
            return Node(
                {str(key): build(item, (*path, key), position) for key, item in value.items()}, origin
            )
        if isinstance(value, list | tuple):
            return Node([build(item, (*path, index), position) for index, item in enumerate(value)], origin)
        return Node(value, origin)

    return build(value, (), None)


def with_origin(value: Any, origin: Origin) -> Node:
    """A plain value as a tree whose every node has the same origin."""
    if isinstance(value, dict):
        return Node({str(key): with_origin(item, origin) for key, item in value.items()}, origin)
    if isinstance(value, list):
        return Node([with_origin(item, origin) for item in value], origin)
    return Node(value, origin)


def name_of(node: Node) -> str | None:
    """The `name` of a list entry, or None."""
    inside = node.value.get("name") if isinstance(node.value, dict) else None
    return inside.value if inside is not None and isinstance(inside.value, str) else None


def is_delete(node: Node) -> bool:
    """Whether this value is the `"!delete"` marker."""
    return isinstance(node.value, str) and node.value == DELETE


def is_removal(node: Node) -> bool:
    """Whether this list entry is `{name = "x", remove = true}`."""
    return (
        isinstance(node.value, dict)
        and set(node.value) == {"name", "remove"}
        and node.value["remove"].value is True
    )


def merge(base: Node, over: Node) -> Node:
    """`over` laid over `base` by the rules above; neither is changed. Markers that met nothing are kept."""
    if base.is_table and over.is_table:
        return _merge_tables(base, over)
    both_lists = base.is_list and over.is_list and base.value and over.value
    if both_lists and all(name_of(entry) is not None for entry in (*base.value, *over.value)):
        return _merge_named(base, over)
    return over


def _merge_tables(base: Node, over: Node) -> Node:
    kept: dict[str, Node] = base.value
    if _switches_kind(base, over):
        kept = {"name": base.value["name"]} if "name" in base.value else {}
        kept = {key: node for key, node in kept.items() if key not in over.value or key == "name"}
    merged = dict(kept)
    for key, node in over.value.items():
        if is_delete(node) and key in base.value and not is_delete(base.value[key]):
            merged.pop(key, None)
        elif key in merged:
            merged[key] = merge(merged[key], node)
        else:
            merged[key] = node
    return Node(merged, over.origin or base.origin)


def _switches_kind(base: Node, over: Node) -> bool:
    old, new = base.value.get("kind"), over.value.get("kind")
    return old is not None and new is not None and not is_delete(new) and old.value != new.value


def _merge_named(base: Node, over: Node) -> Node:
    entries = list(base.value)
    for node in over.value:
        names = [name_of(entry) for entry in entries]
        index = names.index(name_of(node)) if name_of(node) in names else None
        if index is None:
            entries.append(node)
        elif not is_removal(node):
            entries[index] = node if is_removal(entries[index]) else merge(entries[index], node)
        elif not is_removal(entries[index]):
            del entries[index]
    said = [name_of(node) for node in over.value]
    if all(name_of(entry) in said for entry in base.value):
        entries.sort(key=lambda entry: said.index(name_of(entry)))
    return Node(entries, over.origin or base.origin)


def leftover_markers(tree: Node, skip: frozenset[str] = frozenset()) -> list[tuple[Path, Node]]:
    """Markers that removed nothing, outside the top-level keys `skip`."""
    found = []
    for path, node in tree.walk():
        if path and path[0] in skip:
            continue
        if is_delete(node) or is_removal(node):
            found.append((path, node))
    return found
