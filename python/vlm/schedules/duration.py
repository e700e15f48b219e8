"""Lengths of time in a preset: 300 (steps), "300 steps", "5%", "2 epochs", "1_000_000 samples"."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from vlm.config.errors import RequestError

_FORM = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*(steps?|samples?|epochs?|%)\s*")


def _checked(value: int | str) -> int | str:
    if isinstance(value, int):
        if value < 0:
            raise ValueError("expected a length of 0 or more")
        return value
    if not _FORM.fullmatch(value):
        raise ValueError(f'{value!r} is no length: expected steps (300), "5%", "2 epochs" or "10000 samples"')
    return value


Duration = Annotated[int | str, AfterValidator(_checked)]


def in_steps(length: int | str, *, total: int | None, batch_size: int, samples: int | None) -> int:
    """A length as a number of updates, rounded to the nearest.

    total: updates of the stage, for percentages. samples: samples of one epoch. Raises RequestError when the unit
    needs what is not known (an epoch of packed rows).
    """
    if isinstance(length, int):
        return length
    match = _FORM.fullmatch(length)
    if match is None:
        raise ValueError(f"{length!r} is no length")
    number, unit = float(match[1].replace("_", "")), match[2].rstrip("s")
    if unit == "step":
        return round(number)
    if unit == "sample":
        return round(number / batch_size)
    if unit == "epoch":
        if samples is None:
            raise RequestError(f"{length!r} needs a source of known length", remedy="say it in steps, or as a share of the stage")
        return round(number * samples / batch_size)
    if total is None:
        raise RequestError(f"{length!r} is a share, expected an absolute length here")
    return round(number / 100 * total)


def interval_in_steps(length: int | str, *, total: int | None, batch_size: int, samples: int | None) -> int:
    """How many updates lie between two of something: as `in_steps`, 0 for never, and at least 1 for any other length."""
    steps = in_steps(length, total=total, batch_size=batch_size, samples=samples)
    return steps or int(isinstance(length, str) and re.search("[1-9]", length) is not None)
