"""Scores of positions inside a decoder (`tokens.score`): what speaks for keeping each.

n rows, T positions, H heads, D head width, C width. Sources: core-select, aim, pyramiddrop, vision-token-search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from vlm.config.options import Options
from vlm.ops import attention_column_sums, attention_pagerank
from vlm.tokens.score import Rotary, ScoringBlock

Norm = Literal["next-layer", "previous-layer"]
_NORM = "whose norm, queries, keys and rotary positions: of the layer to come, or of the one just run"
DRAWN = 1 << 16
"""Places of a picture that a random order is drawn for; a larger picture repeats it."""


@dataclass(frozen=True)
class View:
    """A row between two layers: x [n, T, C] after block `done`, which read `before`; block `next` is to come.

    scope [n, T] bool: the prompt up to its last text, one document a row; number [n, T] int64: of a visual position in its
    picture, as that was before any drop; text [n, T] bool: positions of text.
    """

    x: Tensor
    before: Tensor
    done: ScoringBlock
    next: ScoringBlock
    rotary: Rotary | None
    scope: Tensor
    number: Tensor
    text: Tensor

    def of(self, norm: Norm) -> tuple[Tensor, ScoringBlock]:
        """(what the block reads, the block)."""
        return (self.x, self.next) if norm == "next-layer" else (self.before, self.done)

    def queries_keys(self, norm: Norm) -> tuple[Tensor, Tensor]:
        """queries [n, H, T, D], keys [n, G, T, D]"""
        x, block = self.of(norm)
        y = block.norm1(x)
        return block.attention.queries(y, self.rotary), block.attention.keys(y, self.rotary)


class AttentionFromRowsOptions(Options):
    """The attention that chosen query rows pay to each position."""

    kind: Literal["attention-from-rows"] = "attention-from-rows"
    rows: Literal["last-instruction"] = Field(
        "last-instruction", description="the last position of text before each answer; several turns: their mean"
    )
    norm: Norm = Field("next-layer", description=_NORM)


class AttentionReceivedOptions(Options):
    """The attention that each position receives from all of the prompt: mean over heads and query rows."""

    kind: Literal["attention-received"] = "attention-received"
    norm: Norm = Field("previous-layer", description=_NORM)

    def score(self, view: View) -> Tensor:
        """[n, T] float32."""
        q, k = view.queries_keys(self.norm)
        count = view.scope.sum(1, keepdim=True).clamp(min=1)
        sums = attention_column_sums(q, k, causal=True, key_mask=view.scope, weights=view.scope[:, None].to(torch.float32))
        return sums.mean(1) / count


class PageRankOptions(Options):
    """Importance by a short walk along the attention: x <- x softmax(A / temperature), root mean square over heads (aim)."""

    kind: Literal["pagerank"] = "pagerank"
    temperature: float = Field(0.1, gt=0, description="divides the masked logits")
    iterations: int = Field(5, ge=1, le=100, description="steps; a causal walk that never ends stands on the first position")
    damping: float = Field(0.0, ge=0, lt=1, description="share of each step that starts anew")
    norm: Norm = Field("previous-layer", description=_NORM)

    def score(self, view: View) -> Tensor:
        """[n, T] float32."""
        q, k = view.queries_keys(self.norm)
        x = attention_pagerank(
            q, k, temperature=self.temperature, iterations=self.iterations, damping=self.damping, causal=True, key_mask=view.scope
        )
        return x.square().mean(1).sqrt()


class NormScoreOptions(Options):
    """The length of a position's vector."""

    kind: Literal["norm"] = "norm"
    best: Literal["largest", "smallest"] = "largest"

    def score(self, view: View) -> Tensor:
        """[n, T] float32."""
        return norms(view.x, self.best)


class RandomScoreOptions(Options):
    """A drawn order of the places of a picture, the same for every picture: what any score must beat."""

    kind: Literal["random"] = "random"
    seed: int = Field(0, ge=0, description="of the order")

    def score(self, view: View) -> Tensor:
        """[n, T] float32."""
        return random_order(view.number, self.seed)


class UniformScoreOptions(Options):
    """Evenly spaced places of a picture, in raster order; fewer are a part of more."""

    kind: Literal["uniform"] = "uniform"

    def score(self, view: View) -> Tensor:
        """[n, T] float32."""
        return uniform_order(view.number)


class UniformGridScoreOptions(Options):
    """Evenly spaced places of a picture in both directions of its grid; fewer are a part of more."""

    kind: Literal["uniform-grid"] = "uniform-grid"
    columns: int = Field(gt=0, le=4096, description="columns of the grid, whose tokens come row by row")

    def score(self, view: View) -> Tensor:
        """[n, T] float32."""
        return grid_order(view.number, self.columns)


class SimilarityToTextOptions(Options):
    """How like the text of the prompt a position is: cosine of hidden states."""

    kind: Literal["similarity-to-text"] = "similarity-to-text"
    reduce: Literal["mean", "max"] = Field("mean", description="mean: of the cosines with all positions of text; max: the best of them")

    @torch.no_grad()
    def score(self, view: View) -> Tensor:
        """[n, T] float32; 0 in a row without text."""
        unit = torch.nn.functional.normalize(view.x.float(), dim=-1)
        text = (view.scope & view.text)[..., None]
        said = torch.where(text, unit, 0.0)
        if self.reduce == "mean":
            return (unit * (said.sum(1, keepdim=True) / text.sum(1, keepdim=True).clamp(min=1))).sum(-1)
        cosines = (unit @ said.transpose(1, 2)).masked_fill(~text.transpose(1, 2), -2.0).amax(-1)
        return torch.where(cosines < -1.5, 0.0, cosines)


DecoderScore = Annotated[
    AttentionFromRowsOptions
    | AttentionReceivedOptions
    | PageRankOptions
    | NormScoreOptions
    | RandomScoreOptions
    | UniformScoreOptions
    | UniformGridScoreOptions
    | SimilarityToTextOptions,
    Field(discriminator="kind"),
]
"""The catalogue of `tokens.score`."""


def norms(x: Tensor, best: Literal["largest", "smallest"]) -> Tensor:
    """x [..., C] -> lengths [...] float32, negative where the smallest are best."""
    length = x.detach().float().square().sum(-1).sqrt()
    return length if best == "largest" else -length


def random_order(number: Tensor, seed: int) -> Tensor:
    """number int64 [...] -> scores [...] float32, drawn for each number."""
    drawn = np.random.default_rng([seed, DRAWN]).permutation(DRAWN).astype(np.float32)
    return torch.from_numpy(drawn).to(number.device)[number.clamp(min=0) % DRAWN]


def uniform_order(number: Tensor) -> Tensor:
    """number int64 [...] -> scores [...] float32: the bits of the number turned around, small ones first."""
    rest, turned = number.clamp(min=0), torch.zeros_like(number)
    for _ in range(16):
        half = torch.div(rest, 2, rounding_mode="floor")
        turned, rest = 2 * turned + (rest - 2 * half), half
    return -turned.to(torch.float32)


def grid_order(number: Tensor, columns: int) -> Tensor:
    """number int64 [...] of places in a grid of so many columns -> scores [...] float32: the bits of column and row in turn,
    turned around, small ones first. The first 4^k places of a grid whose sides are powers of 2 are an even grid themselves."""
    place = number.clamp(min=0)
    row, turned = torch.div(place, columns, rounding_mode="floor"), torch.zeros_like(place)
    parts = [place - row * columns, row]
    for _ in range(12):
        for axis, rest in enumerate(parts):
            half = torch.div(rest, 2, rounding_mode="floor")
            turned, parts[axis] = 2 * turned + (rest - 2 * half), half
    return -turned.to(torch.float32)
