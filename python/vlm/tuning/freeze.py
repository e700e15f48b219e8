"""Which parameters are trained, and how fast."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from pydantic import Field

from vlm.config.errors import RequestError
from vlm.config.options import Options


class RatePattern(Options):
    """Parameters that match learn at `factor` times the base rate."""

    pattern: str
    factor: float = Field(ge=0)
    weight_decay: float | None = Field(None, ge=0, description="weight decay of these parameters; default: the optimiser's")


def matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def trainable(names: Sequence[str], train: Sequence[str], freeze: Sequence[str]) -> list[str]:
    """The names to train. Raises RequestError for a pattern that matches nothing, naming the nearest parameters."""
    for pattern in (*train, *freeze):
        if not any(fnmatchcase(name, pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 5)][:5])
            raise RequestError(f"tuning pattern {pattern!r} matches no parameter", remedy=f"parameters are called like {some}")
    return [name for name in names if matches(name, train) and not matches(name, freeze)]
