"""Learning-rate schedules as a factor of the base rate. Sources: clip, cpt-simple, coop."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.schedules.duration import Duration, in_steps


class LearningRateOptions(Options):
    """Warm-up from 0 or at a constant rate, then a shape down to a floor."""

    kind: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Duration = Field("5%", description="linear rise from 0: steps, share, epochs or samples")
    warmup_factor: float | None = Field(
        None, ge=0, le=1, description="share of the base rate that the whole warm-up has; none: it rises from 0"
    )
    floor: float = Field(0.0, ge=0, le=1, description="final rate as a share of the base rate")

    @model_validator(mode="after")
    def _falls(self) -> LearningRateOptions:
        self.read_only_where(self.kind != "constant", 'kind = "linear" or "cosine"', "floor")
        return self


def rate_factor(options: LearningRateOptions, step: int, total: int, *, batch_size: int, samples: int | None) -> float:
    """Factor for update `step` (0-based) of `total`. The first update of a warm-up has 1 / warm-up."""
    warmup = in_steps(options.warmup, total=total, batch_size=batch_size, samples=samples)
    if step < warmup:
        return (step + 1) / warmup if options.warmup_factor is None else options.warmup_factor
    if options.kind == "constant":
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    shape = 1 - done if options.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return options.floor + (1 - options.floor) * shape
