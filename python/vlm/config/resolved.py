"""Resolved: settled values of a preset with their origins, before any schema."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vlm.config.errors import PresetError
from vlm.config.files import PresetFile
from vlm.config.positions import Path
from vlm.config.tree import Node, Origin, leftover_markers, merge, node_of


@dataclass(frozen=True)
class Resolved:
    """Settled values and where each came from.

    tree: the values with origins. files: every file read, bases first; the last one is the preset that was named.
    """

    tree: Node
    files: tuple[PresetFile, ...] = ()

    @cached_property
    def values(self) -> dict[str, Any]:
        """Plain values, without `extends`."""
        return self.tree.plain()

    @cached_property
    def origins(self) -> dict[Path, Origin]:
        """Path of a value -> where it was set; tables and lists too. A made-up value has none."""
        return {path: node.origin for path, node in self.tree.walk() if node.origin is not None}

    @property
    def name(self) -> str:
        """The file that was named, as messages show it."""
        return self.files[-1].shown if self.files else "the command line"

    def origin(self, path: Sequence[str | int]) -> Origin | None:
        """The origin of a path, or of the nearest one above it that has one."""
        parts = tuple(path)
        for length in range(len(parts), -1, -1):
            node = self.tree.find(parts[:length])
            if node is not None and node.origin is not None:
                return node.origin
        return None

    def place(self, path: Sequence[str | int], *, key: bool = False) -> str:
        """`file:line:column` (or `command line: key`) of a path's value, or of its key."""
        origin = self.origin(path)
        if origin is None or not path:
            return f"{self.name}:1:1" if self.files else self.name
        return origin.key_place if key else origin.value_place

    def error(self, path: Sequence[str | int], message: str, remedy: str | None = None) -> PresetError:
        """A PresetError that points at a value: for checks that no schema can say."""
        return PresetError(message, where=self.place(path), remedy=remedy)

    def derive(self, values: Mapping[str, Any], inside: Sequence[str | int] = ()) -> Resolved:
        """`values` with this one's origins; `inside`: the table (a stage) that was laid over the top level for them.

        Raises PresetError for a removal in `inside` that met nothing.
        """
        base = Node({key: node for key, node in self.tree.value.items() if key in values}, self.tree.origin)
        over = self.tree.find(tuple(inside)) if inside else None
        settled = merge(base, over) if over is not None else base
        refuse_leftovers(settled, frozenset())
        return Resolved(_with_origins(node_of(dict(values)), settled), self.files)


def _with_origins(node: Node, known: Node | None) -> Node:
    """`node` with the origins of `known` wherever both have the same path."""
    origin = known.origin if known is not None else None
    if isinstance(node.value, dict):
        inside = known.value if known is not None and known.is_table else {}
        return Node({key: _with_origins(item, inside.get(key)) for key, item in node.value.items()}, origin)
    if isinstance(node.value, list):
        entries = known.value if known is not None and known.is_list else []
        padded = [*entries, *[None] * len(node.value)]
        return Node([_with_origins(item, there) for item, there in zip(node.value, padded)], origin)
    return Node(node.value, origin)


def merge_tables(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Plain tables by the rules of `vlm.config.tree`; the arguments stay as they are."""
    return merge(node_of(dict(base)), node_of(dict(over))).plain()


def refuse_leftovers(tree: Node, skip: frozenset[str]) -> None:
    """Raises PresetError for the first removal outside the keys `skip` that removed nothing."""
    for path, node in leftover_markers(tree, skip):
        dotted = dotted_name(path)
        place = node.origin.key_place if node.origin else None
        raise PresetError(f"{dotted} is to be removed, but nothing sets it", where=place)


def dotted_name(path: Sequence[str | int]) -> str:
    """A path as a person writes it: `objectives[0].weight`; keys that are no bare words are quoted."""
    out = ""
    for part in path:
        if isinstance(part, int):
            out += f"[{part}]"
        else:
            word = (
                part
                if part and all(c.isascii() and (c.isalnum() or c in "_-") for c in part)
                else f'"{part}"'
            )
            out += f".{word}" if out else word
    return out
