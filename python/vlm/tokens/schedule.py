"""How many positions of a picture each layer of a decoder reads (`tokens.keep`).

L layers, counted from 1. Every schedule is a share of the picture's original positions for each layer, never rising; the
first layer reads all. Counts are floored from the original count, in exact fractions. Sources: core-select, aim, pyramiddrop,
vision-token-search.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.options import Options

PRECISION = 10**6
"""Greatest denominator of a share: 0.29 is 29/100, and n/N written as a decimal is n/N again."""


def exact(share: float) -> Fraction:
    """The fraction that a preset means by a decimal: 0.29 of 100 is 29."""
    return Fraction(repr(float(share))).limit_denominator(PRECISION)


@dataclass(frozen=True)
class KeepPlan:
    """shares: layer after which positions are dropped -> share of the original count that stays; never rising.
    least: so many stay at any rate, if there were as many."""

    shares: dict[int, Fraction]
    least: int = 0

    def counts(self, tokens: int) -> dict[int, int]:
        """Layer after which is dropped -> positions that a picture of `tokens` keeps."""
        return {layer: min(tokens, max(self.least, tokens * s.numerator // s.denominator)) for layer, s in sorted(self.shares.items())}

    def read(self, tokens: int, depth: int) -> list[int]:
        """[L] positions of a picture of `tokens` that each layer reads."""
        counts, now, out = self.counts(tokens), tokens, []
        for layer in range(1, depth + 1):
            out.append(now)
            now = counts.get(layer, now)
        return out


class Schedule(Options):
    """What all schedules share."""

    min_tokens: int = Field(0, ge=0, description="positions of a picture that stay at least, if it has as many")

    def shares(self, depth: int) -> dict[int, Fraction]:
        """Layer after which is dropped -> share that stays. Raises ValueError where it does not fit `depth` layers."""
        raise NotImplementedError

    def plan(self, depth: int) -> KeepPlan:
        """Raises ValueError where the schedule does not fit a decoder of `depth` layers."""
        return KeepPlan(self.shares(depth), self.min_tokens)


class ConstantOptions(Schedule):
    """Every layer but the first reads the same share."""

    kind: Literal["constant"] = "constant"
    ratio: float = Field(ge=0, le=1, description="share of the original count")

    def shares(self, depth: int) -> dict[int, Fraction]:
        return {1: exact(self.ratio)} if depth > 1 else {}


class OneCutOptions(Schedule):
    """One cut after one layer (FastV)."""

    kind: Literal["one-cut"] = "one-cut"
    after: int = Field(2, ge=1, description="after this layer, counted from 1")
    ratio: float = Field(ge=0, le=1, description="share of the original count that stays")

    def shares(self, depth: int) -> dict[int, Fraction]:
        _below("keep.after is", self.after, depth)
        return {self.after: exact(self.ratio)}


class StagesOptions(Schedule):
    """After each of the layers a share of a picture's original positions is kept, floored (pyramiddrop)."""

    kind: Literal["stages"] = "stages"
    layers: list[int] = Field(min_length=1, description="after these layers, counted from 1, strictly rising")
    ratios: list[float] = Field(min_length=1, description="shares of the original count, never rising")

    @model_validator(mode="after")
    def _in_order(self) -> StagesOptions:
        if len(self.layers) != len(self.ratios):
            raise ValueError(f"{len(self.layers)} layers and {len(self.ratios)} ratios: expected one ratio a layer")
        if self.layers[0] < 1 or any(b <= a for a, b in zip(self.layers, self.layers[1:])):
            raise ValueError(f"layers are {self.layers}, expected 1 or more, strictly rising")
        _falling("ratios", self.ratios)
        return self

    def shares(self, depth: int) -> dict[int, Fraction]:
        _below("keep.layers are", self.layers, depth)
        return {layer: exact(ratio) for layer, ratio in zip(self.layers, self.ratios)}


class LinearOptions(Schedule):
    """All up to a layer, then `step` less after every layer until nothing is left (aim)."""

    kind: Literal["linear"] = "linear"
    start: int = Field(ge=1, description="after this layer, counted from 1, the first `step` goes")
    step: float = Field(0.125, gt=0, le=1, description="share of the original count that goes after each layer")

    def shares(self, depth: int) -> dict[int, Fraction]:
        _below("keep.start is", self.start, depth)
        step = exact(self.step)
        return {layer: max(Fraction(0), 1 - (layer - self.start + 1) * step) for layer in range(self.start, depth)}


class SigmoidOptions(Schedule):
    """Layer l reads low + (high - low) / (1 + exp(k (l - alpha))); alpha is given, or solved from a budget (P-Sigmoid)."""

    kind: Literal["sigmoid"] = "sigmoid"
    k: float = Field(0.4, gt=0, description="steepness: small is flat, large is one step")
    budget: float | None = Field(None, gt=0, le=1, description="mean share over all layers; solves alpha")
    alpha: float | None = Field(None, description="the layer at which half is left, where no budget is given")
    low: float = Field(0.0, ge=0, le=1, description="share of the deepest layers")
    high: float = Field(1.0, ge=0, le=1, description="share of the first layers")

    @model_validator(mode="after")
    def _one_of(self) -> SigmoidOptions:
        if (self.budget is None) == (self.alpha is None):
            raise ValueError("expected either budget or alpha")
        if self.low > self.high:
            raise ValueError(f"low is {self.low:g} and high {self.high:g}: shares must not rise")
        return self

    def shares(self, depth: int) -> dict[int, Fraction]:
        if self.budget is None:
            assert self.alpha is not None
            rates = sigmoid_rates(depth, self.k, self.alpha, low=self.low, high=self.high)
        else:
            rates = solved_rates(depth, self.k, self.budget, low=self.low, high=self.high)
        return {layer: exact(rates[layer]) for layer in range(1, depth)}


class TableOptions(Schedule):
    """A share for every layer, as the search writes it (vision-token-search)."""

    kind: Literal["table"] = "table"
    ratios: list[float] = Field(min_length=1, description="share of the original count that each layer reads; 1, then never rising")

    @model_validator(mode="after")
    def _in_order(self) -> TableOptions:
        _falling("ratios", self.ratios)
        if self.ratios[0] != 1:
            raise ValueError(f"ratios begin with {self.ratios[0]:g}, expected 1: nothing can be dropped before the first layer")
        return self

    def shares(self, depth: int) -> dict[int, Fraction]:
        if len(self.ratios) != depth:
            raise ValueError(f"tokens.keep.ratios has {len(self.ratios)} entries, the language model {depth} layers")
        return {layer: exact(self.ratios[layer]) for layer in range(1, depth)}


ScheduleOptions = Annotated[
    ConstantOptions | OneCutOptions | StagesOptions | LinearOptions | SigmoidOptions | TableOptions, Field(discriminator="kind")
]
"""The catalogue of `tokens.keep`."""


def sigmoid_rates(depth: int, k: float, alpha: float, *, low: float = 0.0, high: float = 1.0, full: int = 1) -> list[float]:
    """[L] share of each layer; the first `full` layers read all."""
    rates = [low + (high - low) * _falling_half(k * (layer - alpha)) for layer in range(1, depth + 1)]
    return [1.0] * min(full, depth) + rates[full:]


def solved_rates(depth: int, k: float, budget: float, *, low: float = 0.0, high: float = 1.0, full: int = 1) -> list[float]:
    """`sigmoid_rates` whose mean is `budget`. Raises ValueError for a budget that no alpha reaches."""
    return sigmoid_rates(depth, k, solved_alpha(depth, k, budget, low=low, high=high, full=full), low=low, high=high, full=full)


def solved_alpha(depth: int, k: float, budget: float, *, low: float = 0.0, high: float = 1.0, full: int = 1) -> float:
    """The alpha at which the mean over all layers is `budget`, by bisection: the mean grows with alpha."""
    if not 0 < k < math.inf:
        raise ValueError(f"k is {k:g}, expected above 0")
    full = min(full, depth)
    free = depth - full
    least, most = (full + free * low) / depth, (full + free * high) / depth
    if not least < budget < most:
        if free and budget == most:
            return depth + 40.0 / k
        raise ValueError(
            f"a budget of {budget:g} is out of reach for {depth} layers of which {full} read all: "
            f"expected above {least:.4g}, up to {most:.4g}"
        )
    below, above = 1 - 40.0 / k, depth + 40.0 / k
    for _ in range(200):
        middle = (below + above) / 2
        mean = math.fsum(sigmoid_rates(depth, k, middle, low=low, high=high, full=full)) / depth
        below, above = (middle, above) if mean < budget else (below, middle)
    return (below + above) / 2


def _falling_half(x: float) -> float:
    """1 / (1 + exp(x)) without overflow."""
    return math.exp(-x) / (1 + math.exp(-x)) if x > 0 else 1 / (1 + math.exp(x))


def _falling(name: str, ratios: Sequence[float]) -> None:
    if not all(0 <= ratio <= 1 for ratio in ratios) or any(b > a for a, b in pairwise(ratios)):
        raise ValueError(f"{name} are {list(ratios)}, expected within 0..1, never rising")


def _below(what: str, layers: int | list[int], depth: int) -> None:
    """Raises ValueError unless a drop after each of the layers has a layer behind it."""
    if max(layers if isinstance(layers, list) else [layers]) >= depth:
        raise ValueError(f"tokens.{what} {layers}, expected below the language model's depth {depth}")
