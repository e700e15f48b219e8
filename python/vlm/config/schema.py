"""Reading an options class as a schema: which keys it has, and which class a union takes for given values."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

_UNION = (Union, types.UnionType)


def fields_of(schema: type[BaseModel]) -> dict[str, FieldInfo]:
    """Key as a preset writes it (the alias where there is one) -> field."""
    return {field.alias or name: field for name, field in schema.model_fields.items()}


def members(annotation: Any) -> list[Any]:
    """The members of a union, nested ones and aliases opened up; anything else alone. `None` is left out."""
    while (
        hasattr(annotation, "__value__") or get_origin(annotation) is Annotated
    ):  # `type X = ...`, Annotated[X, ...]
        annotation = annotation.__value__ if hasattr(annotation, "__value__") else get_args(annotation)[0]
    if get_origin(annotation) in _UNION:
        return [m for part in get_args(annotation) for m in members(part)]
    return [] if annotation is type(None) else [annotation]


def options_in(annotation: Any) -> list[type[BaseModel]]:
    """The options classes that a value of this annotation may be."""
    return [m for m in members(annotation) if isinstance(m, type) and issubclass(m, BaseModel)]


def kind_of(schema: type[BaseModel]) -> str | None:
    """The word that `kind` must be for this class, None where it has no such key."""
    field = schema.model_fields.get("kind")
    words = (
        get_args(field.annotation) if field is not None and get_origin(field.annotation) is Literal else ()
    )
    return str(words[0]) if words else None


def choose(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The options class that a table is of: by its `kind`, else the only one there is, else the nearest by its keys."""
    candidates = options_in(annotation)
    if not isinstance(value, Mapping) or not candidates:
        return candidates[0] if len(candidates) == 1 else None
    if "kind" in value:
        for candidate in candidates:
            if kind_of(candidate) == value["kind"]:
                return candidate
        return candidates[0] if len(candidates) == 1 else None
    return max(candidates, key=lambda c: len(set(fields_of(c)) & set(value)))


def child(annotation: Any, key: str | int, value: Any) -> Any:
    """The annotation of what stands under `key` in a value of `annotation`; Any where nothing is known."""
    schema = choose(annotation, value) if not isinstance(key, int) else None
    if schema is not None:
        field = fields_of(schema).get(str(key))
        if field is not None:
            return field.annotation
    for member in members(annotation):
        origin, arguments = get_origin(member), get_args(member)
        if isinstance(key, int) and isinstance(origin, type) and issubclass(origin, Sequence) and arguments:
            fixed = origin is tuple and Ellipsis not in arguments
            return arguments[min(key, len(arguments) - 1)] if fixed else arguments[0]
        if isinstance(key, str) and isinstance(origin, type) and issubclass(origin, Mapping) and arguments:
            return arguments[1]
    return Any


def is_union(annotation: Any) -> bool:
    """Whether pydantic adds the member's label to the location of an error inside."""
    return len(members(annotation)) > 1


def describe(annotation: Any) -> str:
    """A type in a user's words: `integer`, `"a" | "b"`, `table of kind x | y`, `list of text`."""
    words: list[str] = []
    tables = options_in(annotation)
    for member in members(annotation):
        word = "table" if member in tables else _describe_one(member)
        if word not in words:
            words.append(word)
    kinds = [kind for kind in (kind_of(table) for table in tables) if kind]
    if kinds and len(tables) > 1:
        words[words.index("table")] = f"table of kind {' | '.join(kinds)}"
    return " | ".join(words) or "anything"


_WORDS: dict[Any, str] = {
    bool: "true | false",
    int: "integer",
    float: "number",
    str: "text",
    dict: "table",
    list: "list",
    tuple: "list",
    Any: "anything",
}


def _describe_one(member: Any) -> str:
    origin, arguments = get_origin(member), get_args(member)
    if origin is Literal:
        return " | ".join(f'"{word}"' if isinstance(word, str) else str(word) for word in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"table of {describe(arguments[1])}"
    if origin is tuple and Ellipsis not in arguments:
        return f"list [{', '.join(describe(argument) for argument in arguments)}]"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"list of {describe(arguments[0])}"
    return _WORDS.get(member, getattr(member, "__name__", str(member)))


@dataclass(frozen=True)
class KeyDoc:
    """What is known of one key. `default`: as TOML would say it, None where a value is required or empty."""

    path: tuple[str | int, ...]
    type: str
    required: bool
    default: Any
    description: str
    value: Any = None
    is_set: bool = False


def document(schema: type[BaseModel], values: Mapping[str, Any]) -> list[KeyDoc]:
    """Every key that a preset with these values can have, in the order of the schema, tables opened up.

    A union of tables is opened for the kind that `values` choose; where they choose none it stays closed.
    """
    found: list[KeyDoc] = []
    _document(schema, values, (), found, depth=0)
    return found


def _document(
    schema: type[BaseModel],
    values: Mapping[str, Any],
    path: tuple[str | int, ...],
    found: list[KeyDoc],
    depth: int,
) -> None:
    for key, field in fields_of(schema).items():
        is_set = key in values
        value = values.get(key)
        here = (*path, key)
        default = field.get_default(call_default_factory=False)
        plain = None if default is PydanticUndefined else _plain(default)
        found.append(
            KeyDoc(
                here,
                describe(field.annotation),
                field.is_required(),
                plain,
                field.description or "",
                value,
                is_set,
            )
        )
        _open(field.annotation, value if is_set else plain, here, found, depth)


def _open(annotation: Any, value: Any, path: tuple[str | int, ...], found: list[KeyDoc], depth: int) -> None:
    if depth > 8:
        return
    tables = options_in(annotation)
    if tables and (isinstance(value, Mapping) or (value is None and len(members(annotation)) == 1)):
        chosen = choose(annotation, value or {})
        if chosen is not None:
            _document(chosen, value or {}, path, found, depth + 1)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            if isinstance(entry, Mapping):
                _open(child(annotation, index, value), entry, (*path, index), found, depth + 1)
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            _open(child(annotation, name, value), entry, (*path, name), found, depth + 1)


def _plain(default: Any) -> Any:
    if isinstance(default, BaseModel):
        return default.model_dump(mode="json", exclude_unset=True)
    return list(default) if isinstance(default, tuple) else default
