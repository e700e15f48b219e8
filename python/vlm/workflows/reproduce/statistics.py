"""From paired figures to a verdict: the t-interval over seeds, and the rule that reads it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

Verdict = Literal["holds", "fails", "not seen", "underpowered"]
VERDICTS: tuple[str, ...] = get_args(Verdict)
CONFIDENCE = 0.95


def verdict(mean: float, lower: float, upper: float, margin: float) -> Verdict:
    """What a paired difference says of a claim. Positive is better; `lower <= mean <= upper`, `margin >= 0`.

    holds         the interval lies above 0 and the mean is at least the margin
    not seen      the interval has 0 in it and lies strictly inside (-margin, margin)
    fails         otherwise, the interval lies wholly below the margin: the claimed effect is excluded, or reversed
    underpowered  otherwise: the interval reaches the margin, so more seeds could still say either

    Raises ValueError for figures that are not numbers or not in order.
    """
    if any(math.isnan(x) for x in (mean, lower, upper, margin)) or not lower <= mean <= upper or margin < 0:
        raise ValueError(f"no interval: {lower} .. {mean} .. {upper} with margin {margin}")
    if lower > 0 and mean >= margin:
        return "holds"
    if lower <= 0 <= upper and -margin < lower and upper < margin:
        return "not seen"
    if upper < margin:
        return "fails"
    return "underpowered"


@cache
def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t with P(|T| < t) = confidence for `freedom` degrees of freedom. Raises ValueError below one."""
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"{freedom} degrees of freedom, confidence {confidence}")
    low, high = 0.0, 1.0
    while _inside(high, freedom) < confidence:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _inside(t: float, freedom: int) -> float:
    """P(|T| < t): the finite sums for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if odd else 2, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total


@dataclass(frozen=True)
class Paired:
    """Mean difference over paired seeds with its t-interval; positive: the method is better, in the metric's unit.

    With fewer than two pairs nothing is known of the spread, and the interval is without bounds.
    """

    pairs: int
    mean: float
    lower: float
    upper: float

    @classmethod
    def of(cls, method: Sequence[float], baseline: Sequence[float], direction: str = "higher") -> Paired:
        """Raises ValueError when there is nothing to pair, or the two are not of one length."""
        if len(method) != len(baseline) or not method:
            raise ValueError(f"{len(method)} and {len(baseline)} figures cannot be paired")
        sign = 1.0 if direction == "higher" else -1.0
        differences = [sign * (a - b) for a, b in zip(method, baseline)]
        count = len(differences)
        mean = math.fsum(differences) / count
        if count < 2:
            return cls(count, mean, -math.inf, math.inf)
        deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (count - 1))
        half = t_quantile(count - 1) * deviation / math.sqrt(count)
        return cls(count, mean, mean - half, mean + half)

    def verdict(self, margin: float) -> Verdict:
        return verdict(self.mean, self.lower, self.upper, margin)
