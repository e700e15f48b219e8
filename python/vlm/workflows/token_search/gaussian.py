"""A Gaussian process of one variable and the next place to measure: Matern 5/2 kernel, expected improvement, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SCALES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
"""Length scales that are tried, of places within 0..1."""


def matern52(x: Floats, y: Floats, scale: float) -> Floats:
    """[n, m] covariances of places x [n] and y [m]."""
    distance = np.abs(x[:, None] - y[None, :]) * (math.sqrt(5.0) / scale)
    out: Floats = (1 + distance + distance**2 / 3) * np.exp(-distance)
    return out


@dataclass(frozen=True)
class Process:
    """A process that was shown values at places [n] within 0..1; the length scale is the likeliest of `SCALES`."""

    places: Floats
    mean: float
    spread: float
    scale: float
    lower: Floats
    weights: Floats

    @classmethod
    def of(cls, places: Floats, values: Floats, noise: float = 1e-3) -> Process:
        """noise: deviation of a measurement, in deviations of the values. Raises ValueError without a value."""
        if not len(places):
            raise ValueError("a process needs one value at least")
        places, values = np.asarray(places, np.float64), np.asarray(values, np.float64)
        mean, spread = float(values.mean()), float(values.std()) or 1.0
        y = (values - mean) / spread
        best: tuple[float, float, Floats, Floats] | None = None
        for scale in SCALES:
            covariance = matern52(places, places, scale) + (noise**2 + 1e-10) * np.eye(len(places))
            lower: Floats = np.asarray(np.linalg.cholesky(covariance), np.float64)
            weights: Floats = np.asarray(np.linalg.solve(lower.T, np.linalg.solve(lower, y)), np.float64)
            likelihood = -0.5 * float(y @ weights) - float(np.log(np.diag(lower)).sum())
            if best is None or likelihood > best[0]:
                best = likelihood, scale, lower, weights
        assert best is not None
        return cls(places, mean, spread, *best[1:])

    def at(self, x: Floats) -> tuple[Floats, Floats]:
        """(mean, deviation) of the value at places x [m]."""
        cross = matern52(self.places, np.asarray(x, np.float64), self.scale)
        mean = self.mean + self.spread * (cross.T @ self.weights)
        variance = 1 - (np.linalg.solve(self.lower, cross) ** 2).sum(0)
        return mean, self.spread * np.sqrt(np.clip(variance, 0, None))

    def improvement(self, x: Floats, best: float) -> Floats:
        """[m] expected gain over `best` of a measurement at each place."""
        mean, deviation = self.at(x)
        gain = mean - best
        with np.errstate(divide="ignore", invalid="ignore"):
            z = np.where(deviation > 0, gain / deviation, 0.0)
        density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
        below = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in z]))
        return np.where(deviation > 1e-9 * self.spread, gain * below + deviation * density, np.clip(gain, 0, None))


def maximise(
    value: Callable[[int], float], places: Floats, *, first: list[int], evaluations: int, noise: float = 1e-3
) -> dict[int, float]:
    """Values by index of `places` [m] (within 0..1), measured at `first` and then where the expected gain is greatest.

    Ends after so many evaluations, when every place was measured, or when no gain is expected. Equal gains: the lower index.
    """
    seen: dict[int, float] = {}
    for index in first[:evaluations]:
        if index not in seen:
            seen[index] = value(index)
    while len(seen) < min(evaluations, len(places)):
        known = sorted(seen)
        process = Process.of(places[known], np.array([seen[i] for i in known]), noise)
        gain = process.improvement(places, max(seen.values()))
        gain[known] = -1.0
        index = int(gain.argmax())
        if gain[index] <= 1e-12 * process.spread and len(seen) > 2:
            break
        seen[index] = value(index)
    return seen
