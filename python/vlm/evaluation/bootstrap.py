"""Bootstrap intervals of means and ratios, by cluster where several samples share one concept.

n observations, K figures, C clusters, R replicates. Source: Efron and Tibshirani, percentile method; clusters are
drawn whole, because pictures of one concept are not independent evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

RESAMPLES = 1000
LEVEL = 0.95
_Z = 1.959963984540054  # the normal quantile of LEVEL, two-sided
_CHUNK = 2**22  # resampling weights held at a time


@dataclass(frozen=True)
class Estimate:
    """K figures with the bounds of their 95% intervals, each [K] float64, and the number of clusters drawn."""

    value: Floats
    lower: Floats
    upper: Floats
    clusters: int


def cluster_ids(names: Sequence[Hashable]) -> Integers:
    """[n] int64 in 0..C-1 in order of first appearance. None is a cluster of its own each time."""
    seen: dict[Hashable, int] = {}
    out = np.empty(len(names), dtype=np.int64)
    for i, name in enumerate(names):
        out[i] = seen.setdefault((i, None) if name is None else (0, name), len(seen))
    return out


def _sums(values: Floats, clusters: Integers, count: int) -> Floats:
    """[n, K] summed within clusters to [C, K]."""
    return np.stack(
        [np.bincount(clusters, values[:, k], minlength=count) for k in range(values.shape[1])], axis=1
    )


def _weights(count: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each cluster is drawn, [r, C] float64, for `resamples` replicates in blocks of rows."""
    generator = np.random.default_rng([seed, count])
    step = max(1, _CHUNK // count)
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        yield generator.multinomial(count, np.full(count, 1 / count), size=rows).astype(np.float64)


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share over n observations."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(
    numerator: Floats,
    denominator: Floats | None = None,
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    share: bool = False,
) -> Estimate:
    """sum(numerator) / sum(denominator) of each column, with percentile bounds.

    numerator: [n] or [n, K]; denominator: the same shape or [n] (1 when absent: the mean). clusters: one name an
    observation; None: each its own cluster. share: the figures are shares in 0..1; where every cluster agrees
    (all right or all wrong) resampling sees no spread at all, and the Wilson interval over clusters stands in.
    Raises ValueError for no observations or a denominator that sums to nothing.
    """
    top = np.asarray(numerator, dtype=np.float64)
    top = top[:, None] if top.ndim == 1 else top
    n, width = top.shape
    if n == 0:
        raise ValueError("no observations to estimate from")
    bottom = np.ones_like(top) if denominator is None else np.asarray(denominator, dtype=np.float64)
    bottom = np.broadcast_to(bottom[:, None] if bottom.ndim == 1 else bottom, top.shape)
    ids = np.arange(n) if clusters is None else cluster_ids(clusters)
    count = int(ids.max()) + 1
    tops, bottoms = _sums(top, ids, count), _sums(bottom, ids, count)
    if (bottoms.sum(0) <= 0).any():
        raise ValueError("the denominator sums to nothing")
    value = tops.sum(0) / bottoms.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [(w @ tops) / (w @ bottoms) for w in _weights(count, resamples, seed)]
    draws = np.concatenate(parts)
    # A replicate that drew only empty clusters says nothing; it is left out rather than counted as 0.
    lower = np.nanpercentile(draws, 100 * (1 - LEVEL) / 2, axis=0)
    upper = np.nanpercentile(draws, 100 * (1 + LEVEL) / 2, axis=0)
    if share:
        for k in range(width):
            if value[k] in (0.0, 1.0):
                lower[k], upper[k] = wilson(float(value[k]), count)
    return Estimate(value, lower, upper, count)


def bootstrap_sums(
    statistics: Floats,
    figure: Callable[[Floats], Floats],
    *,
    clusters: Sequence[Hashable] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """figure(sum of the rows), with percentile bounds: for figures of a corpus that are no mean of its samples.

    statistics [n, S]; figure: sums [..., S] -> K figures [..., K], for many sums at once; a figure that is not
    defined (nan) in a replicate is left out of it. The same seed and clusters draw the same replicates, so the
    difference of two figures over the same samples is a paired one. What the rows were computed with (document
    frequencies, for CIDEr) stays as it is: only the samples are drawn again.
    Raises ValueError for no observations.
    """
    rows = np.asarray(statistics, dtype=np.float64)
    if not len(rows):
        raise ValueError("no observations to estimate from")
    ids = np.arange(len(rows)) if clusters is None else cluster_ids(clusters)
    count = int(ids.max()) + 1
    sums = _sums(rows, ids, count)
    value = figure(sums.sum(0))
    draws = np.concatenate([figure(weights @ sums) for weights in _weights(count, resamples, seed)])
    lower, upper = value.copy(), value.copy()
    for k in range(len(value)):
        known = draws[~np.isnan(draws[:, k]), k]
        if len(known):
            lower[k], upper[k] = np.percentile(known, [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2])
    return Estimate(value, lower, upper, count)
