"""Options in the address of a drawn set: `NAME:?n=20000&seed=1&split=val`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qsl

from vlm.config.errors import DataError

SPLITS = ("train", "val", "test")


def options_of(uri: str, name: str, numbers: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """The options that an address gives. numbers: those that are whole numbers, with the least and the greatest.

    Raises DataError that names a wrong option and the known ones.
    """
    query = uri.removeprefix(f"{name}:").lstrip("/").removeprefix("?")
    known = ", ".join([*numbers, "split"])
    options: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True, strict_parsing=False):
        if key == "split" and value in SPLITS:
            options[key] = value
        elif key == "split":
            raise DataError(f"split is {value!r}, expected one of {', '.join(SPLITS)}", where=uri)
        elif key in numbers:
            low, high = numbers[key]
            if not value.isascii() or not value.isdigit() or not low <= int(value) <= high:
                raise DataError(f"{key} is {value!r}, expected a number from {low} to {high}", where=uri)
            options[key] = int(value)
        else:
            raise DataError(f"unknown option {key!r}", where=uri, remedy=f"known options: {known}")
    if query and not options:
        raise DataError(f"cannot read the options {query!r}", where=uri, remedy=f"write {name}:?n=1000&split=val")
    return options
