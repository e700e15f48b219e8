"""Descriptors: what can be seen of a class, in words, and the texts they make with its name. Source: dclip.

    red fox, which has pointed ears        red fox, which is a small wild dog        red fox, which can climb
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from vlm.config.errors import DataError
from vlm.runtime.prompt import plain_name

Descriptors = dict[str, tuple[str, ...]] | str
"""Class -> descriptors, or the JSON file that holds such a table."""
Control = Literal["names", "random-words", "other-class"]
"""What descriptors are compared with: names alone, as many random words, the descriptors of another class."""

MAX_FILE = 64 * 2**20
_EXPECTED = 'expected JSON: {"red fox": ["has a bushy tail", "pointed ears"], "crow": ["black feathers"]}'
_WHICH = frozenset(
    ["has", "have", "is", "are", "can", "may", "might", "could", "often", "usually", "typically", "sometimes", "lives", "looks"]
)
_IS = frozenset(["a", "an", "used", "made", "found", "known", "covered"])
_ALONE = frozenset(["which", "with", "without", "in", "on", "that"])


def read_descriptors(given: Mapping[str, Sequence[str]] | str | os.PathLike[str]) -> dict[str, tuple[str, ...]]:
    """The table itself, or that of a JSON file. A class may have none, then its name alone is its text.

    Raises DataError naming the file and the class for anything else.
    """
    where = "descriptors" if isinstance(given, Mapping) else os.fspath(given)
    table: Any = given if isinstance(given, Mapping) else _table(Path(given))
    out: dict[str, tuple[str, ...]] = {}
    for label, phrases in table.items():
        good = isinstance(phrases, list | tuple) and all(isinstance(one, str) and one.strip() for one in phrases)
        if not good:
            raise DataError(f"descriptors of {label!r} are {phrases!r}, expected a list of texts", where=where, remedy=_EXPECTED)
        out[str(label)] = tuple(" ".join(one.split()) for one in phrases)
    if not out:
        raise DataError("holds no class", where=where, remedy=_EXPECTED)
    return out


def _table(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_FILE:
            raise DataError(f"larger than {MAX_FILE} bytes", where=str(path))
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"cannot be read as JSON: {said}", where=str(path), remedy=_EXPECTED) from error
    if not isinstance(value, dict):
        raise DataError(f"holds {type(value).__name__}", where=str(path), remedy=_EXPECTED)
    return value


def descriptors_of(table: Mapping[str, tuple[str, ...]], label: str, names: Sequence[str] = ()) -> tuple[str, ...]:
    """Those of a class, by label, else by name, case and underscores aside. Raises DataError for a class that the table lacks."""
    for wanted in (label, *names):
        if wanted in table:
            return table[wanted]
    plain = {plain_name(key).casefold(): phrases for key, phrases in table.items()}
    for wanted in (label, *names):
        found = plain.get(plain_name(wanted).casefold())
        if found is not None:
            return found
    some = ", ".join(list(table)[:5])
    raise DataError(f"class {label!r} has no descriptors", remedy=f"add it (an empty list for its name alone); there are {some}")


def phrase(descriptor: str) -> str:
    """The descriptor as it goes on after the name: `which has ...`, `which is a ...`, or with its own verb."""
    first = descriptor.split()[0].casefold()
    if first in _ALONE:
        return descriptor
    if first in _WHICH:
        return f"which {descriptor}"
    return f"which is {descriptor}" if first in _IS else f"which has {descriptor}"


def described(text: str, descriptors: Sequence[str]) -> list[str]:
    """The texts of a class: its own text with each descriptor after it; the text alone where there is none."""
    return [f"{text}, {phrase(one)}" for one in descriptors] or [text]


def controlled_table(table: Mapping[str, tuple[str, ...]], control: Control, seed: int) -> dict[str, tuple[str, ...]]:
    """The table with descriptors that say nothing of their class; seed: of the draw.

    names: none at all. random-words: as many a class and as many words each, drawn from the words of all descriptors.
    other-class: each class has those of another one.
    """
    if control == "names":
        return dict.fromkeys(table, ())
    draw = random.Random(f"descriptors:{seed}")
    if control == "random-words":
        words = sorted({word for phrases in table.values() for one in phrases for word in one.split()})
        return {
            label: tuple(" ".join(draw.choice(words) for _ in one.split()) for one in phrases) for label, phrases in table.items()
        }
    labels = list(table)
    draw.shuffle(labels)
    after = dict(zip(labels, [*labels[1:], labels[0]]))  # a ring: nobody keeps its own
    return {label: table[after[label]] for label in table}
