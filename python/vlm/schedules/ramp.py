"""Any scalar of a preset may change over its stage. Sources: mt-nlg, token-crisis, dynloss, ernie3."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from vlm.config.options import Options


class Ramp(Options):
    """From one value to another over a part of the stage, constant outside it."""

    start: float = Field(description="value at the beginning")
    end: float = Field(description="value at the end")
    shape: Literal["linear", "cosine", "geometric"] = "linear"
    begin: float = Field(0.0, ge=0, le=1, description="share of the stage at which it begins to change")
    over: float = Field(1.0, gt=0, le=1, description="share of the stage that the change takes")

    @model_validator(mode="after")
    def _has_a_ratio(self) -> Ramp:
        if self.shape == "geometric" and not self.start * self.end > 0:
            ends = f"from {self.start:g} to {self.end:g}"
            raise ValueError(f"a geometric ramp goes by a ratio: {ends}, expected two numbers of one sign and not 0")
        return self


Scalar = float | Ramp


def value_at(scalar: Scalar, progress: float) -> float:
    """The value at `progress` in 0..1 of the stage."""
    if not isinstance(scalar, Ramp):
        return float(scalar)
    done = min(1.0, max(0.0, (progress - scalar.begin) / scalar.over))
    if scalar.shape == "cosine":
        done = 0.5 * (1 - math.cos(math.pi * done))
    if scalar.shape == "geometric":
        return scalar.start * (scalar.end / scalar.start) ** done
    return scalar.start + (scalar.end - scalar.start) * done
