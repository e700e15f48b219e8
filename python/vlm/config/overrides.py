"""Overrides from the command line: `key.sub=value`, the value in TOML syntax or a bare word.

List entries are addressed by name, `objectives.contrastive.weight=2`, or by index, `stages.0.train.steps=5`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm.config.errors import PresetError
from vlm.config.nearest import did_you_mean
from vlm.config.positions import parse_key
from vlm.config.tree import Node, Origin, is_delete, merge, name_of, with_origin


@dataclass(frozen=True)
class Override:
    """One `key=value`, parsed."""

    parts: tuple[str, ...]
    value: Any
    text: str

    @property
    def key(self) -> str:
        return self.text.partition("=")[0].strip()


def parse_override(text: str) -> Override:
    """Raises PresetError (`command line: ...`) that says what was expected."""
    try:
        parts, end = parse_key(text)
        rest = text[end:].lstrip()
    except ValueError:
        parts, rest = (), ""
    if not parts or not rest.startswith("="):
        raise PresetError(
            f"{text!r} is no override",
            where="command line",
            remedy="expected key.sub=value, as in train.steps=100",
        )
    return Override(parts, parse_value(rest[1:].strip(), text), text)


def parse_value(raw: str, text: str) -> Any:
    """A TOML value; what is none is a bare word, unless it begins like a quoted string, list or table."""
    try:
        values = tomllib.loads(f"value = {raw}") if raw else {}
        if set(values) == {"value"}:
            return values["value"]
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        if raw[:1] in tuple("\"'[{"):
            raise PresetError(
                f"{raw!r} is neither a TOML value nor a bare word ({error})",
                where=f"command line: {text.partition('=')[0].strip()}",
                remedy="quote it for the shell as well, as in 'data.mean=[0.5, 0.5, 0.5]'",
            ) from None
    return raw


def apply_overrides(tree: Node, texts: Sequence[str]) -> Node:
    """The tree with every override laid over it, the last one winning.

    An override that sets a `kind` goes before the ones to the same table's other keys, whatever the order they were
    given in: switching a kind drops the keys of the old one, and must not drop what the same command line asks for.
    Raises PresetError for a text that is no override and for a list entry that does not exist.
    """
    for override in _kinds_first([parse_override(text) for text in texts]):
        tree = _laid(tree, override.parts, override)
    return tree


def _kinds_first(overrides: list[Override]) -> list[Override]:
    ordered: list[Override] = []
    for override in overrides:
        at = len(ordered)
        if override.parts[-1] == "kind":
            table = override.parts[:-1]
            while at and not _is_barrier(ordered[at - 1].parts, table):
                at -= 1
        ordered.insert(at, override)
    return ordered


def _is_barrier(parts: tuple[str, ...], table: tuple[str, ...]) -> bool:
    """Whether an override to `parts` may itself set the table's kind, so that order counts."""
    return parts == table[: len(parts)] or parts == (*table, "kind")


def _laid(node: Node, parts: tuple[str, ...], override: Override) -> Node:
    origin = Origin.of_override(override.key)
    if not parts:
        return merge(node, with_origin(override.value, origin))
    head, rest = parts[0], parts[1:]
    if node.is_list:
        index = _index(node, head, override)
        entries = list(node.value)
        changed = _laid(entries[index], rest, override)
        entries[index : index + 1] = [] if is_delete(changed) else [changed]
        return Node(entries, node.origin)
    if not node.is_table:
        node = Node({}, origin)
    if parts == ("kind",):  # as a file would: switching kinds drops the keys of the old one
        return merge(node, Node({"kind": with_origin(override.value, origin)}, node.origin))
    inside = dict(node.value)
    if head not in inside:
        inside[head] = _nested(rest, with_origin(override.value, origin), origin)
    else:
        changed = _laid(inside[head], rest, override)
        if is_delete(changed) and not is_delete(inside[head]):
            del inside[head]
        else:
            inside[head] = changed
    return Node(inside, node.origin)


def _nested(parts: tuple[str, ...], value: Node, origin: Origin) -> Node:
    for part in reversed(parts):
        value = Node({part: value}, origin)
    return value


def _index(node: Node, head: str, override: Override) -> int:
    names = [name_of(entry) for entry in node.value]
    if head in names:
        return names.index(head)
    if head.isdigit() and int(head) < len(names):
        return int(head)
    known = [name for name in names if name is not None]
    listed = ", ".join(known) if known else f"0 to {len(names) - 1}" if names else "none"
    raise PresetError(
        f"the list has no entry {head!r}{did_you_mean(head, known)}",
        where=f"command line: {override.key}",
        remedy=f"its entries: {listed}",
    )
