"""Two searches for how many visual tokens each layer reads: layer by layer (greedy), and the steepness of a curve under a
budget (sigmoid). Source: vision-token-search.

L layers, N visual tokens of a picture. A table is L counts, N first, never rising. Both take the score as a function of a
table, higher is better, and ask for no table twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from vlm.config.options import Options
from vlm.tokens import solved_rates
from vlm.workflows.token_search.gaussian import maximise

Table = tuple[int, ...]
Score = Callable[[Table], float]


class GreedyOptions(Options):
    """From shallow to deep the least count that keeps the score, all deeper layers alike, then fixed (G-Search)."""

    kind: Literal["greedy"] = "greedy"
    inner: Literal["bisect", "bayes"] = Field("bisect", description="how one layer's count is found")
    tolerance: float = Field(0.5, ge=0, description="score that may be lost in all, against the model that keeps everything")
    group: int = Field(1, ge=1, description="so many layers in a row share a count: fewer measurements")
    least: int = Field(0, ge=0, description="smallest count of a layer")
    evaluations: int = Field(15, ge=2, description="bayes: measurements for one count")
    weight: float = Field(0.05, gt=0, description="bayes: what all tokens of a layer are worth, in score; small: the score comes first")


class CurveOptions(Options):
    """The steepness of a sigmoid whose mean is the budget (P-Sigmoid)."""

    kind: Literal["sigmoid"] = "sigmoid"
    budget: float = Field(gt=0, lt=1, description="mean share of visual tokens over all layers")
    evaluations: int = Field(20, ge=2, description="measurements")
    lowest: float = Field(0.05, gt=0, description="smallest k: nearly flat")
    highest: float = Field(10.0, gt=0, description="greatest k: nearly one step")
    noise: float = Field(0.1, gt=0, description="deviation of a measurement, in deviations of the scores")


SearchOptions = Annotated[GreedyOptions | CurveOptions, Field(discriminator="kind")]

PLACES = 121
"""Values of k that are looked at, evenly spaced in their logarithm."""


@dataclass(frozen=True)
class Found:
    """table: what each layer reads; score: of it; full: of the model that keeps everything; k: of the curve, where there is one."""

    table: Table
    score: float
    full: float
    k: float | None = None


def remembering(score: Score) -> Score:
    """The same function, asked once for each table."""
    known: dict[Table, float] = {}

    def ask(table: Table) -> float:
        if table not in known:
            known[table] = score(table)
        return known[table]

    return ask


def greedy(score: Score, depth: int, tokens: int, options: GreedyOptions) -> Found:
    """The tables are nested by making: a layer never reads more than the one before."""
    ask = remembering(score)
    full = ask((tokens,) * depth)
    wanted = full - options.tolerance
    fixed: Table = (tokens,)
    while len(fixed) < depth:
        share = min(options.group, depth - len(fixed))
        find = _bisected if options.inner == "bisect" else _bayesian

        def of(count: int, fixed: Table = fixed) -> float:
            return ask(fixed + (count,) * (depth - len(fixed)))

        count = find(of, options.least, fixed[-1], wanted, options, tokens)
        fixed += (count,) * share
    return Found(fixed, ask(fixed), full)


def _bisected(of: Callable[[int], float], least: int, most: int, wanted: float, options: GreedyOptions, tokens: int) -> int:
    """The least count whose score reaches `wanted`, where the score never falls with the count; `most` is known to."""
    low, high = min(least, most), most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if of(middle) >= wanted else (middle + 1, high)
    return high


def _bayesian(of: Callable[[int], float], least: int, most: int, wanted: float, options: GreedyOptions, tokens: int) -> int:
    """The least measured count that reaches `wanted`; measured where score lacking and tokens spent promise to be least."""
    low = min(least, most)
    scores: dict[int, float] = {}

    def value(index: int) -> float:
        scores[low + index] = of(low + index)
        return min(scores[low + index] - wanted, 0.0) - options.weight * (low + index) / tokens

    count = most - low + 1
    places = np.linspace(0.0, 1.0, count)
    maximise(value, places, first=[count - 1, 0, count // 2], evaluations=options.evaluations)
    return min([n for n, s in scores.items() if s >= wanted], default=most)


def table_of(depth: int, tokens: int, k: float, budget: float) -> Table:
    """The counts of a curve, floored."""
    return tuple(int(tokens * rate + 1e-9) for rate in solved_rates(depth, k, budget))


def curve(score: Score, depth: int, tokens: int, options: CurveOptions, like: Sequence[int] | None = None) -> Found:
    """like: a table that the first k shall fit best, of an earlier greedy search. Raises ValueError for a budget out of reach.

    Of equal scores the smaller k.
    """
    ask = remembering(score)
    where: dict[Table, float] = {}  # of the values of k that give one table, the smallest
    for place in np.linspace(0.0, 1.0, PLACES).tolist():
        where.setdefault(table_of(depth, tokens, _k_at(place, options), options.budget), place)
    tables, places = list(where), np.array(list(where.values()))
    first = [len(tables) // 2] if like is None else [int(np.argmin([_apart(table, like) for table in tables]))]
    first += [0, len(tables) - 1]
    seen = maximise(lambda i: ask(tables[i]), places, first=first, evaluations=options.evaluations, noise=options.noise)
    best = max(seen, key=lambda i: (seen[i], -i))
    return Found(tables[best], seen[best], ask((tokens,) * depth), _k_at(float(places[best]), options))


def _k_at(place: float, options: CurveOptions) -> float:
    """k at a place within 0..1, evenly spaced in its logarithm."""
    return math.exp((1 - place) * math.log(options.lowest) + place * math.log(options.highest))


def _apart(table: Sequence[int], other: Sequence[int]) -> float:
    """Squared distance of two tables, each as shares of its sum."""
    a, b = np.asarray(table, np.float64), np.asarray(other, np.float64)
    return float(((a / a.sum() - b / b.sum()) ** 2).sum())
