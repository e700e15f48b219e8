"""Merging inside a vision tower: the most similar pairs of tokens become one between attention and feed-forward layer
(`merge` of a tower). Source: core-tome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vlm.config.options import Options
from vlm.ops import bipartite_match, compose_assignments, merge_tokens


class BipartiteOptions(Options):
    """Tokens in turn left and right; each of the left may go into the most similar one of the right."""

    kind: Literal["bipartite"] = "bipartite"
    metric: Literal["keys", "random"] = Field(
        "keys", description="keys: cosine of the attention's keys, their mean over heads; random: drawn pairs, what any metric must beat"
    )
    protect: int | None = Field(None, ge=0, description="leading tokens that are never merged; default: the class token")


class MergeOptions(Options):
    """What two tokens become."""

    kind: Literal["merge"] = "merge"
    weighting: Literal["size", "mean"] = Field("size", description="size: by how many patches each stands for; mean: plain")
    proportional: bool = Field(True, description="attention counts a token as often as it stands for a patch (+ log size)")


class ConstantRemoval(Options):
    """The same number of pairs in every layer."""

    kind: Literal["constant"] = "constant"
    r: int = Field(ge=0, description="pairs merged in each layer")

    def pairs(self, depth: int) -> list[int]:
        return [self.r] * depth


class DecreasingRemoval(Options):
    """2 r pairs in the first layer, falling evenly to none in the last: about as many in all."""

    kind: Literal["decreasing"] = "decreasing"
    r: int = Field(ge=0, description="mean number of pairs merged in a layer")

    def pairs(self, depth: int) -> list[int]:
        return [2 * self.r * (depth - 1 - layer) // max(1, depth - 1) if depth > 1 else self.r for layer in range(depth)]


class TowerMergeOptions(Options):
    """Pairs of similar tokens become one in every layer of the tower."""

    when: Literal["always", "inference"] = Field(
        "always", description="inference: a training step reads everything, and only evaluation, generation and bundles merge"
    )
    match: Annotated[BipartiteOptions, Field()] = BipartiteOptions()
    apply: Annotated[MergeOptions, Field()] = MergeOptions()
    remove: Annotated[ConstantRemoval | DecreasingRemoval, Field(discriminator="kind")]
    restore: bool = Field(False, description="after the last layer every patch gets what it became part of: the grid is whole again")

    def plan(self, depth: int, tokens: int, *, class_token: bool) -> MergePlan:
        """The plan for a tower of `depth` layers that reads `tokens` tokens, the class token included."""
        protect = int(class_token) if self.match.protect is None else self.match.protect
        left, pairs = tokens, []
        for wanted in self.remove.pairs(depth):
            pairs.append(max(0, min(wanted, (left - protect) // 2)))
            left -= pairs[-1]
        return MergePlan(tuple(pairs), protect, self.apply.weighting, self.apply.proportional, self.restore, self.match.metric)


@dataclass(frozen=True)
class MergePlan:
    """pairs: merged in each layer; protect: leading tokens that stay."""

    pairs: tuple[int, ...]
    protect: int
    weighting: Literal["size", "mean"]
    proportional: bool
    restore: bool
    metric: Literal["keys", "random"] = "keys"

    def left(self, tokens: int, layers: int) -> int:
        """Tokens after so many layers."""
        return tokens if self.restore else tokens - sum(self.pairs[:layers])

    def bias(self, sizes: Tensor | None) -> Tensor | None:
        """What the logits of keys get, [B, 1, 1, N]: log size; None where every token stands for itself."""
        return None if sizes is None or not self.proportional else sizes.log()[:, None, None]

    def merge(
        self, layer: int, x: Tensor, keys: Tensor, sizes: Tensor | None, places: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x [B, N, C] after the attention of `layer` (from 0), keys [B, G, N, D] of that attention, sizes [B, N] and places
        [B, N0] so far -> those after the merge."""
        r = self.pairs[layer]
        if not r:
            return x, sizes, places
        tokens = x.shape[1]
        metric = keys.detach() if self.metric == "keys" else drawn_metric(tokens, layer).to(x.device).expand(len(x), -1, -1)
        matching = bipartite_match(metric, r, self.protect)
        x, sizes = merge_tokens(x, sizes, matching, self.weighting)
        return x, sizes, matching.assign if places is None else compose_assignments(places, matching.assign)


def drawn_metric(tokens: int, layer: int) -> Tensor:
    """[1, N, 8] float32, drawn for each layer."""
    drawn = np.random.default_rng([layer, tokens]).standard_normal((1, tokens, 8)).astype(np.float32)
    return torch.from_numpy(drawn)


def merge_down(x: Tensor, keep: int, *, weighting: Literal["size", "mean"], order: Literal["similarity", "position"]) -> Tensor:
    """x [B, N, C] -> [B, keep, C]: rounds of merging by cosine of the tokens themselves, each at most half. Source: aim.

    Sizes are not carried from round to round with weighting "mean". order: of the result; similarity: in each round what
    stays of the left side by falling cosine, then the right side; position: by index.
    """
    sizes: Tensor | None = None
    while x.shape[1] > keep:
        matching = bipartite_match(x.detach(), min(x.shape[1] // 2, x.shape[1] - keep), 0, order=order)
        x, sizes = merge_tokens(x, sizes, matching, weighting)
    return x
