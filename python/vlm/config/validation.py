"""Pydantic's verdict on resolved values, said in terms of the preset: file, line, column, expected, nearest key."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vlm.config.errors import PresetError
from vlm.config.nearest import did_you_mean
from vlm.config.options import Options
from vlm.config.resolved import Resolved, dotted_name
from vlm.config.schema import child, choose, describe, fields_of, is_union, kind_of, options_in

S = TypeVar("S", bound=Options)

_MOST = 20


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where` as in VlmError."""

    where: str
    message: str
    remedy: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def validate(resolved: Resolved, schema: type[S]) -> S:
    """The values as an instance of `schema`.

    Raises one PresetError: the first problem in full, the others a line each; `problems` has them all.
    """
    try:
        return schema.model_validate(resolved.values)
    except ValidationError as error:
        raise preset_error(problems_of(error, resolved, schema)) from None


def preset_error(problems: Sequence[Problem]) -> PresetError:
    """One error for several problems."""
    first, *others = problems
    lines = [first.remedy] if first.remedy else []
    lines += [f"{problem}" for problem in others[:_MOST]]
    if len(others) > _MOST:
        lines.append(f"and {len(others) - _MOST} more")
    error = PresetError(first.message, where=first.where, remedy="\n  ".join(lines) or None)
    error.problems = tuple(problems)
    return error


def problems_of(error: ValidationError, resolved: Resolved, schema: type[BaseModel]) -> list[Problem]:
    """Every problem; unknown keys first, since a misspelt key is often what makes another one missing."""
    located: dict[tuple[str | int, ...], list[tuple[ErrorDetails, Any]]] = {}
    for details in error.errors(include_url=False, include_context=True):
        path, annotation = _locate(details, resolved.values, schema)
        located.setdefault(path, []).append((details, annotation))
    problems = []
    for path, group in sorted(located.items(), key=lambda item: item[1][0][0]["type"] != "extra_forbidden"):
        # Members of a union that fail deeper down say more than "not a number" about the table as a whole.
        if not any(
            other[: len(path)] == path and len(other) > len(path) and _is_wrong_type(group)
            for other in located
        ):
            problems.append(_problem(path, group, resolved, schema))
    return problems


def _is_wrong_type(group: Sequence[tuple[ErrorDetails, Any]]) -> bool:
    return all(d["type"].endswith(("_type", "_parsing")) or d["type"] == "literal_error" for d, _ in group)


def _locate(details: ErrorDetails, values: Any, schema: type[BaseModel]) -> tuple[tuple[str | int, ...], Any]:
    """The path in the preset of pydantic's location, which also holds labels of union members; and what is expected."""
    path: tuple[str | int, ...] = ()
    value, annotation = values, schema
    parts = list(details["loc"])
    while parts:
        part = parts.pop(0)
        if (
            isinstance(value, Mapping)
            and is_union(annotation)
            and part == value.get("kind")
            and (parts or part not in value)
        ):
            continue  # the label of a union's member
        if isinstance(value, Mapping) and (part in value or (not parts and _is_key(part, details))):
            annotation, value = child(annotation, part, value), value.get(part)
        elif isinstance(value, list | tuple) and isinstance(part, int) and part < len(value):
            annotation, value = child(annotation, part, value), value[part]
        else:
            continue
        path = (*path, part)
    return path, annotation


def _is_key(part: str | int, details: ErrorDetails) -> bool:
    return details["type"] in ("missing", "extra_forbidden") and isinstance(part, str)


def _problem(
    path: tuple[str | int, ...],
    group: Sequence[tuple[ErrorDetails, Any]],
    resolved: Resolved,
    schema: type[BaseModel],
) -> Problem:
    details, annotation = group[0]
    name, kind = dotted_name(path), details["type"]
    if kind == "extra_forbidden":
        return _unknown_key(path, resolved, schema)
    if kind == "missing" and not _is_there(resolved.values, path):
        table = dotted_name(path[:-1])
        owner = f"[{table}] lacks" if table else "the preset lacks"
        return Problem(
            resolved.place(path[:-1], key=True),
            f"{owner} {path[-1]!r}: expected {describe(annotation)}",
            _about(path, resolved, schema),
        )
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        return _unknown_kind(path, annotation, resolved)
    where, value = resolved.place(path), _value_at(resolved.values, path)
    name = "" if where.endswith(f": {name}") else name  # an override's place is its key
    said = f"{name}: " if name else ""
    if kind in ("value_error", "assertion_error"):
        text = details["msg"].partition(", ")[2] or details["msg"]
        return Problem(where, said + text)
    if kind == "missing" or all(
        d["type"] == "literal_error" or d["type"].endswith(("_type", "_parsing", "from_float"))
        for d, _ in group
    ):
        near = did_you_mean(value, _words(annotation))
        return Problem(where, f"{said}expected {describe(annotation)}, got {_shown(value)}{near}")
    text = details["msg"].removeprefix("Input should ")
    text = f"must {text}" if text != details["msg"] else text[:1].lower() + text[1:]
    return Problem(
        where, f"{said}{text}, got {_shown(value)}" if path else text, _about(path, resolved, schema)
    )


def _unknown_key(path: tuple[str | int, ...], resolved: Resolved, schema: type[BaseModel]) -> Problem:
    annotation: Any = schema
    value: Any = resolved.values
    for part in path[:-1]:
        annotation, value = child(annotation, part, value), value[part]
    chosen = choose(annotation, value)
    known = sorted(fields_of(chosen)) if chosen is not None else []
    table = dotted_name(path[:-1])
    inside = f" in [{table}]" if table else ""
    near = did_you_mean(path[-1], known)
    elsewhere = (
        ""
        if near or len(path) < 2
        else did_you_mean(path[-1], sorted(fields_of(schema)), "; did you mean the top-level")
    )
    return Problem(
        resolved.place(path, key=True),
        f"unknown key {str(path[-1])!r}{inside}{near}{elsewhere}",
        f"known keys{inside}: {', '.join(known)}" if known else None,
    )


def _unknown_kind(path: tuple[str | int, ...], annotation: Any, resolved: Resolved) -> Problem:
    kinds = [kind for kind in (kind_of(option) for option in options_in(annotation)) if kind]
    value = _value_at(resolved.values, path)
    listed = ", ".join(kinds)
    if not isinstance(value, Mapping) or "kind" not in value:
        return Problem(
            resolved.place(path, key=True), f"[{dotted_name(path)}] lacks 'kind': expected one of {listed}"
        )
    near = did_you_mean(value["kind"], kinds)
    return Problem(
        resolved.place((*path, "kind")),
        f"unknown kind {_shown(value['kind'])} of [{dotted_name(path)}]{near}",
        f"known kinds: {listed}",
    )


def _words(annotation: Any) -> list[str]:
    return [word.strip('"') for word in describe(annotation).split(" | ") if word.startswith('"')]


def _about(path: tuple[str | int, ...], resolved: Resolved, schema: type[BaseModel]) -> str | None:
    """The description of a key, if its schema has one."""
    annotation: Any = schema
    value: Any = resolved.values
    for part in path[:-1]:
        annotation = child(annotation, part, value)
        value = value[part]
    chosen = choose(annotation, value)
    field = fields_of(chosen).get(str(path[-1])) if chosen is not None and path else None
    return f"{path[-1]}: {field.description}" if field is not None and field.description else None


def _value_at(values: Any, path: Sequence[str | int]) -> Any:
    for part in path:
        values = values[part]
    return values


def _is_there(values: Any, path: Sequence[str | int]) -> bool:
    try:
        _value_at(values, path)
    except (KeyError, IndexError, TypeError):
        return False
    return True


def _shown(value: Any) -> str:
    """A value and, where its look does not say it, its type."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, datetime.date | datetime.time):
        return f"the date or time {value.isoformat()}"
    return str(value)
