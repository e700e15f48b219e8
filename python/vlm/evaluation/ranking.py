"""Ranks of the right candidates among all candidates, without the whole score matrix.

Q queries, N candidates, P pairs (query, right candidate), E embedding width.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]

TIE = 1e-6
"""Cosines closer than this count as tied: two matrix products may round the same value differently."""


def ranks(
    queries: Floats,
    candidates: Floats,
    pairs: Integers,
    *,
    rows: int = 1024,
    columns: int = 16384,
    tie: float = TIE,
) -> Integers:
    """[Q] int64: the place, from 1, of each query's best right candidate; 0 where it has none.

    queries [Q, E], candidates [N, E]: unit rows; pairs [P, 2]: (query, right candidate), any number a query.
    Pessimistic: a wrong candidate that ties with the best right one stands before it, so a model that gives every
    candidate the same score ranks last, not first. At most rows x columns scores are held.
    """
    order = np.argsort(pairs[:, 0], kind="stable")
    query, right = pairs[order, 0], pairs[order, 1]
    best = np.full(len(queries), -np.inf, dtype=np.float32)
    for start in range(0, len(query), 2**16):
        q, c = query[start : start + 2**16], right[start : start + 2**16]
        np.maximum.at(best, q, np.einsum("pe,pe->p", queries[q], candidates[c]))
    out = np.zeros(len(queries), dtype=np.int64)
    for top in range(0, len(queries), rows):
        block = queries[top : top + rows]
        threshold = best[top : top + rows, None] - np.float32(tie)
        first, last = np.searchsorted(query, [top, top + len(block)])
        ahead = np.zeros(len(block), dtype=np.int64)
        for left in range(0, len(candidates), columns):
            scores = block @ candidates[left : left + columns].T
            inside = (right[first:last] >= left) & (right[first:last] < left + scores.shape[1])
            scores[query[first:last][inside] - top, right[first:last][inside] - left] = -np.inf
            ahead += (scores >= threshold).sum(1)
        out[top : top + rows] = np.where(np.isfinite(best[top : top + rows]), ahead + 1, 0)
    return out


def chance_at(rights: Integers, candidates: int, cutoffs: tuple[int, ...]) -> NDArray[np.float64]:
    """[len(cutoffs)] share of queries that a random order of the candidates answers within each cutoff.

    rights [Q]: how many right candidates each query has. P(hit within k) = 1 - C(N - c, k) / C(N, k).
    """
    out = np.empty(len(cutoffs))
    for column, cutoff in enumerate(cutoffs):
        k = min(cutoff, candidates)
        miss = np.ones(len(rights))
        for drawn in range(k):
            miss *= np.clip((candidates - rights - drawn) / (candidates - drawn), 0.0, 1.0)
        out[column] = float((1 - miss).mean()) if len(rights) else 0.0
    return out


def first_places(scores: Floats, count: int) -> Integers:
    """[Q, min(count, N)] candidates by falling score; equal scores by their number. scores [Q, N]."""
    return np.argsort(-scores, axis=1, kind="stable")[:, :count]
