"""Classes of a zero-shot task: from a file, or from the distinct values of a data field."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config.errors import DataError, RequestError
from vlm.runtime.prompt import class_names

MAX_FILE = 64 * 2**20
MAX_CLASSES = 1_000_000
LABEL_FIELDS = ("label", "class", "category", "concept", "caption", "text")
"""Where a sample's own class is looked for when the class file does not say and no field was named."""

_EXPECTED = (
    'expected a name a line, or JSON: ["cat", {"name": "cat", "label": "n02", "synonyms": ["kitty"], '
    '"templates": ["a drawing of a {}"], "members": ["sample key"]}], or {"label": "name"}'
)


@dataclass(frozen=True)
class ClassEntry:
    """label: what samples call it; names: the name and its synonyms, as a prompt says them; templates: its own, or
    none to take the task's; members: keys of the samples that belong to it, where the file says so."""

    label: str
    names: tuple[str, ...]
    templates: tuple[str, ...] = ()
    members: frozenset[str] = frozenset()


def classes_of_values(values: Sequence[str]) -> list[ClassEntry]:
    """One class a distinct value, in order. Where two values share a plain name, both are named in full."""
    return [ClassEntry(value, (name,)) for value, name in class_names(sorted(set(values))).items()]


def _strings(value: Any, where: str, field: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
        raise DataError(
            f"{field} is {value!r}, expected text or a list of texts", where=where, remedy=_EXPECTED
        )
    return tuple(item.strip() for item in items)


def _members(value: Any, where: str) -> frozenset[str]:
    """A list of sample keys, or such lists under names (parts, styles)."""
    if isinstance(value, Mapping):
        return frozenset().union(*(_members(part, where) for part in value.values()))
    if not isinstance(value, list):
        raise DataError(f"members is {type(value).__name__}, expected a list of sample keys", where=where)
    return frozenset(str(key) for key in value)


def _entry(value: Any, where: str, label: str | None = None) -> ClassEntry:
    if isinstance(value, str | list):
        names = _strings(value, where, "the class")
        if not names:
            raise DataError("the class has no name", where=where, remedy=_EXPECTED)
        return ClassEntry(label or names[0], names)
    if not isinstance(value, Mapping):
        raise DataError(f"a class is {type(value).__name__}", where=where, remedy=_EXPECTED)
    known = {"name", "label", "synonyms", "templates", "members", "test"}
    unknown = sorted(set(value) - known)
    if unknown:
        raise DataError(
            f"unknown key {unknown[0]!r} (known: {', '.join(sorted(known))})", where=where, remedy=_EXPECTED
        )
    if "name" not in value and label is None:
        raise DataError("the class has no name", where=where, remedy=_EXPECTED)
    names = _strings(value.get("name", label), where, "name") + _strings(
        value.get("synonyms", []), where, "synonyms"
    )
    return ClassEntry(
        label=str(value.get("label", label if label is not None else names[0])),
        names=names,
        templates=_strings(value.get("templates", []), where, "templates"),
        members=_members(value.get("members", []), where),
    )


def read_classes(path: str | Path) -> list[ClassEntry]:
    """Classes from a file: lines or JSON. `FILE#NAME` picks one of the lists that a file holds under `protocols`.

    Raises DataError naming the file and entry; RequestError when a list must be picked.
    """
    text, _, part = str(path).partition("#") if not Path(path).exists() else (str(path), "", "")
    file = Path(text)
    try:
        if file.stat().st_size > MAX_FILE:
            raise DataError(f"larger than {MAX_FILE} bytes", where=text)
        content = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read: {said}", where=text, remedy=_EXPECTED) from error
    if file.suffix == ".json" or content.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise DataError(f"is not JSON: {error}", where=text, remedy=_EXPECTED) from error
        if isinstance(value, dict) and isinstance(value.get("protocols"), dict):
            lists = value["protocols"]
            if part not in lists:
                raise RequestError(
                    f"holds {len(lists)} lists of classes, pick one", where=text,
                    remedy=" or ".join(f"{text}#{name}" for name in lists),
                )  # fmt: skip
            value = lists[part]
        elif part:
            raise RequestError(f"holds one list of classes, not one named {part!r}", where=text)
        if isinstance(value, dict):
            found = [_entry(item, f"{text}: {label!r}", str(label)) for label, item in value.items()]
        elif isinstance(value, list):
            found = [_entry(item, f"{text}: entry {i}") for i, item in enumerate(value, start=1)]
        else:
            raise DataError(f"holds {type(value).__name__}", where=text, remedy=_EXPECTED)
    else:
        found = [ClassEntry(line.strip(), (line.strip(),)) for line in content.splitlines() if line.strip()]
    return checked(found, text)


def checked(classes: list[ClassEntry], where: str) -> list[ClassEntry]:
    """The classes. Raises DataError when there are fewer than two, too many, or two with one label."""
    if not 2 <= len(classes) <= MAX_CLASSES:
        raise DataError(f"{len(classes)} classes, expected 2 to {MAX_CLASSES}", where=where)
    twice = [label for label, times in Counter(entry.label for entry in classes).items() if times > 1]
    if twice:
        raise DataError(f"class {twice[0]!r} is listed twice", where=where)
    return classes


def label_of(value: Any) -> str | None:
    """A field's value as a class label; None where it cannot be one."""
    if isinstance(value, bool) or value is None:
        return None if value is None else str(value).lower()
    if isinstance(value, str):
        return " ".join(value.split()) or None
    return str(value) if isinstance(value, int) else None


def labelled_field(fields: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> str:
    """The first of the wanted fields in which some sample has a class. Raises DataError naming the data's fields."""
    for name in wanted:
        if any(label_of(sample.get(name)) is not None for sample in fields):
            return name
    known = sorted({name for sample in fields for name in sample})
    raise DataError(
        f"no sample has a class in {' or '.join(map(repr, wanted))}",
        remedy=f"name the field with --labels-from FIELD; fields of the data: {', '.join(known) or 'none'}",
    )


def true_classes(
    classes: Sequence[ClassEntry],
    keys: Sequence[str],
    fields: Sequence[Mapping[str, Any]],
    field: str | None,
) -> tuple[list[int], str]:
    """The class number of each sample (-1: of none of the classes), and the field (or `members`) it came from.

    Without a named field: the class file's members by sample key where it has any, else the one of LABEL_FIELDS
    that matches most samples, by label, name or synonym, case aside. Raises DataError when nothing matches.
    """
    by_key = {key: i for i, entry in enumerate(classes) for key in entry.members}
    if field is None and by_key:
        found = [by_key.get(key, by_key.get(key.rpartition(":")[2].rpartition("/")[2], -1)) for key in keys]
        return _matching(found, "members", classes, keys)
    names: dict[Hashable, int] = {}
    for i, entry in reversed(list(enumerate(classes))):
        for name in entry.names:
            names[name.casefold()] = i
    for i, entry in enumerate(classes):  # labels before names: they are what the data says
        names[" ".join(entry.label.split()).casefold()] = i
    best: tuple[list[int], str] = ([-1] * len(keys), field or LABEL_FIELDS[0])
    most = 0
    for candidate in (field,) if field is not None else LABEL_FIELDS:
        labels = [label_of(sample.get(candidate)) for sample in fields]
        found = [-1 if label is None else names.get(label.casefold(), -1) for label in labels]
        hits = sum(i >= 0 for i in found)
        if hits > most:
            best, most = (found, candidate), hits
    return _matching(*best, classes, keys, fields)


def _matching(
    found: list[int],
    field: str,
    classes: Sequence[ClassEntry],
    keys: Sequence[str],
    fields: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], str]:
    if not any(i >= 0 for i in found):
        seen = sorted({str(sample.get(field))[:40] for sample in fields if field in sample})[:5]
        raise DataError(
            f"no sample belongs to one of the {len(classes)} classes (looked at {field!r}: "
            f"{', '.join(seen) or 'absent'}; first class {classes[0].label!r}, first key {keys[0] if keys else 'none'!r})",
            remedy="name the field that holds the class with --labels-from FIELD, or list `members` in the class file",
        )
    return found, field
