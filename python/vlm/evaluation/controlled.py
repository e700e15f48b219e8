"""Figures of a model beside those of its controls, with paired differences.

n rows (answers), S statistics of a row, K figures.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlm.evaluation.bootstrap import bootstrap_sums, wilson
from vlm.evaluation.table import OVER

Floats = NDArray[np.float64]
MAIN = ""
"""The arm that sees its own picture."""


@dataclass(frozen=True)
class Figures:
    """K figures of summed statistics.

    paths: their names, `/` between levels; of: sums [..., S] -> [..., K]; scale: a factor a figure, 100 for percent.
    counted: for a share, the statistics that together count its observations, None for what is no share.
    """

    paths: tuple[str, ...]
    of: Callable[[Floats], Floats]
    scale: tuple[float, ...]
    counted: tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Controlled:
    """metrics, intervals: trees; clusters: how many were drawn."""

    metrics: dict[str, Any]
    intervals: dict[str, Any]
    clusters: int


def put(tree: dict[str, Any], path: str, value: Any) -> None:
    """A value under a path whose levels are separated by `/`."""
    *heads, name = path.split("/")
    for head in heads:
        tree = tree.setdefault(head, {})
    tree[name] = value


def controlled(
    arms: Mapping[str, Floats],
    figures: Figures,
    *,
    clusters: Sequence[Hashable],
    resamples: int,
    seed: int,
) -> Controlled:
    """Each figure, `NAME/...` of each control, and `over_NAME/...`: the figure less the control's, bootstrapped over
    the same draws. arms: statistics [n, S] of each arm over the same rows, the model's own first, under ''.

    A figure that is not defined (nan) is left out. A share of 0 or 1 throughout has the Wilson interval.
    """
    names = list(arms)
    width = arms[names[0]].shape[1]
    kinds = len(figures.paths)
    rows = np.concatenate([arms[name] for name in names], axis=1)
    scale = np.tile(np.asarray(figures.scale, np.float64), 2 * len(names) - 1)

    def every(sums: Floats) -> Floats:
        parts = [figures.of(sums[..., width * a : width * (a + 1)]) for a in range(len(names))]
        return np.concatenate([*parts, *(parts[0] - part for part in parts[1:])], axis=-1)

    estimate = bootstrap_sums(rows, every, clusters=clusters, resamples=resamples, seed=seed)
    lower, upper = estimate.lower.copy(), estimate.upper.copy()
    for a, name in enumerate(names):
        for k, columns in enumerate(figures.counted):
            value = estimate.value[kinds * a + k]
            if columns is not None and value in (0.0, 1.0):
                seen = np.flatnonzero(arms[name][:, list(columns)].sum(axis=1) > 0).tolist()
                held = len({c if (c := clusters[i]) is not None else (i,) for i in seen})
                if held:
                    lower[kinds * a + k], upper[kinds * a + k] = wilson(float(value), held)
    paths = [f"{name}/{path}" if name else path for name in names for path in figures.paths]
    paths += [f"{OVER}{name}/{path}" for name in names[1:] for path in figures.paths]
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for k, path in enumerate(paths):
        if not np.isnan(estimate.value[k]):
            put(metrics, path, round(float(estimate.value[k] * scale[k]), 6))
            ends = {"lower": lower[k], "upper": upper[k]}
            put(intervals, path, {end: round(float(v * scale[k]), 6) for end, v in ends.items()})
    return Controlled(metrics, intervals, estimate.clusters)


def ratio(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, nan where bottom is 0."""
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=np.asarray(bottom) > 0)
