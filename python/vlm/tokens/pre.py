"""Fewer visual tokens before the language model (`tokens.pre`): score, select, apply on what the connector gives.

P pictures, N tokens of a picture, K kept ones, C width, H heads. Sources: fopru, aim, core-select.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.ops import (
    adaptive_pool,
    attention_column_sums,
    attention_lse,
    attention_pagerank,
    gather_tokens,
    select_top,
    stride_pool,
)
from vlm.tokens.attention_merge import AttentionMergeOptions
from vlm.tokens.learned import BernoulliOptions, GumbelHardOptions, LearnedScoreOptions, LearnedStep
from vlm.tokens.merging import merge_down
from vlm.tokens.schedule import exact
from vlm.tokens.score import ScoringBlock, rows_first
from vlm.tokens.score_options import (
    NormScoreOptions,
    RandomScoreOptions,
    UniformGridScoreOptions,
    UniformScoreOptions,
    grid_order,
    norms,
    random_order,
    uniform_order,
)

STEADY = 1e-5
"""A score whose deviation is below so much of its mean is the same everywhere, up to rounding."""


@dataclass(frozen=True)
class TowerView:
    """What block `block` of a tower reads, x [P, N + leading, C]; leading: 1 where a class token stands first."""

    x: Tensor
    block: ScoringBlock
    leading: int

    def queries_keys(self) -> tuple[Tensor, Tensor]:
        y = self.block.norm1(self.x)
        return self.block.attention.queries(y), self.block.attention.keys(y)


class TowerScore(Options):
    """A score by the attention inside the vision tower."""

    layer: int = Field(-2, description="whose attention: -1 the tower's last block, -2 the one before, 1 the first")

    def block(self, depth: int) -> int:
        """Index of the block. Raises ValueError where the tower has no such block."""
        index = depth + self.layer if self.layer < 0 else self.layer - 1
        if not 0 <= index < depth or self.layer == 0:
            raise ValueError(f"layer {self.layer} of a tower of {depth} blocks")
        return index


class TowerAttentionOptions(TowerScore):
    """The attention that a patch receives, or how evenly it looks: mean over heads, mean over queries or keys (fopru)."""

    kind: Literal["attention-received"] = "attention-received"
    query: Literal["patches", "class"] = Field("patches", description="who looks: all patches, or the class token alone")
    axis: Literal["column", "row", "max-variance"] = Field(
        "max-variance", description="column: received from all; row: paid to the patches; whichever varies more over the picture"
    )
    exclude_class: bool = Field(True, description="row: the class token's column is left out of the mean, so rows differ")

    @model_validator(mode="after")
    def _one_row(self) -> TowerAttentionOptions:
        if self.query == "class" and self.axis == "row":
            raise ValueError('axis "row" has one number for query "class": use "column"')
        return self

    def score(self, view: TowerView) -> Tensor:
        """[P, N] float32."""
        column, row = self.both(view)
        if self.axis == "column" or self.query == "class":
            return column
        if self.axis == "row":
            return row
        return torch.where(row_varies_more(column, row)[:, None], row, column)

    @torch.no_grad()
    def both(self, view: TowerView) -> tuple[Tensor, Tensor]:
        """(attention received, attention paid) [P, N], means over N patches (all keys where the class token's stays)."""
        q, k = view.queries_keys()
        first = view.leading
        if self.query == "class":
            if not first:
                raise ValueError('query "class" needs a tower with a class token')
            received = attention_column_sums(q[:, :, :1], k)[:, :, first:].mean(1)
            return received, torch.zeros_like(received)
        q = q[:, :, first:]
        n = q.shape[2]
        column = attention_column_sums(q, k)[:, :, first:].mean(1) / n
        if not first or not self.exclude_class:
            return column, torch.full_like(column, 1 / k.shape[2])
        lse = attention_lse(q, k)
        to_class = ((q.to(lse.dtype) @ k[:, :, :first].to(lse.dtype).transpose(-1, -2))[..., 0] * q.shape[-1] ** -0.5 - lse).exp()
        return column, (1 - to_class.mean(1)) / n


class TowerPageRankOptions(TowerScore):
    """Importance by a short walk along the attention among patches and class token (aim)."""

    kind: Literal["pagerank"] = "pagerank"
    temperature: float = Field(0.1, gt=0, description="divides the logits")
    iterations: int = Field(5, ge=1, le=100, description="steps of the walk")
    damping: float = Field(0.0, ge=0, lt=1, description="share of each step that starts anew")

    def score(self, view: TowerView) -> Tensor:
        """[P, N] float32."""
        q, k = view.queries_keys()
        x = attention_pagerank(q, k, temperature=self.temperature, iterations=self.iterations, damping=self.damping)
        return x.square().mean(1).sqrt()[:, view.leading :]


PreScore = Annotated[
    TowerAttentionOptions
    | TowerPageRankOptions
    | NormScoreOptions
    | RandomScoreOptions
    | UniformScoreOptions
    | UniformGridScoreOptions
    | LearnedScoreOptions,
    Field(discriminator="kind"),
]


class TopShareOptions(Options):
    """The best tokens of a picture; equal scores go to the lower index."""

    kind: Literal["top-k"] = "top-k"
    ratio: float = Field(gt=0, le=1, description="share that stays, rounded to the nearest number of tokens")

    def count(self, tokens: int) -> int:
        return rounded(self.ratio, tokens)


class RowsOptions(Options):
    """Whole rows of the grid by the sum of their scores, until as many tokens are reached."""

    kind: Literal["rows"] = "rows"
    ratio: float = Field(gt=0, le=1, description="share of the tokens that stays, rounded")
    partial: Literal["cut", "drop"] = Field("cut", description="the row that would exceed the share: its first tokens, or none of it")


class ThresholdShareOptions(Options):
    """Tokens whose score reaches so many times the mean of their picture's: another number for every picture."""

    kind: Literal["threshold"] = "threshold"
    times: float = Field(1.0, gt=0, description="times the mean score of the picture")


class MergeDownOptions(Options):
    """Rounds in which the most similar pairs become one, each at most half of what is left."""

    kind: Literal["bipartite"] = "bipartite"
    keep: float = Field(0.25, gt=0, le=1, description="share of the tokens that is left")
    metric: Literal["tokens"] = Field("tokens", description="tokens: cosine of the tokens themselves")


class PoolOptions(Options):
    """The grid of a picture's tokens, pooled to a smaller one: by a stride, or to a shape whatever its own (core-pool)."""

    kind: Literal["pool"] = "pool"
    method: Literal["average", "max", "bilinear"] = Field("average", description="of the tokens of a window; bilinear: the grid resized")
    stride: int | None = Field(None, ge=1, description="side of a window; the last ones may be smaller")
    shape: tuple[int, int] | None = Field(None, description="rows and columns that are left, by adaptive averages (pllava, infmllm)")

    @model_validator(mode="after")
    def _one_of(self) -> PoolOptions:
        if (self.stride is None) == (self.shape is None):
            raise ValueError("expected either stride or shape")
        if self.shape is not None and (self.method != "average" or min(self.shape) < 1):
            raise ValueError('shape goes with method "average", and is at least 1 x 1')
        return self

    def left(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that are left."""
        if self.stride is None:
            assert self.shape is not None
            return self.shape
        return -(-rows // self.stride), -(-columns // self.stride)

    def pooled(self, x: Tensor, columns: int) -> Tensor:
        """x [P, N, C] over a grid of so many columns -> [P, K, C]."""
        grid = x.unflatten(1, (-1, columns))
        if self.stride is not None:
            return stride_pool(grid, self.stride, kind=self.method).flatten(1, 2)
        assert self.shape is not None
        return adaptive_pool(grid, self.shape).flatten(1, 2)


class PickOptions(Options):
    """The chosen tokens, in their order."""

    kind: Literal["gather"] = "gather"


class BlendOptions(Options):
    """What two tokens become, and in which order tokens come out."""

    kind: Literal["merge"] = "merge"
    weighting: Literal["mean", "size"] = Field("mean", description="mean: plain, in each round anew; size: by how many each stands for")
    order: Literal["similarity", "position"] = Field("position", description="similarity: as the rounds leave them (aim's code)")


class PreStepOptions(Options):
    """One step: fewer visual tokens, chosen by a score or merged by likeness."""

    score: PreScore | None = Field(None, description="what speaks for a token; merging has none")
    select: Annotated[
        TopShareOptions | RowsOptions | ThresholdShareOptions | MergeDownOptions | GumbelHardOptions | BernoulliOptions | PoolOptions,
        Field(discriminator="kind"),
    ]
    apply: Annotated[PickOptions | BlendOptions | AttentionMergeOptions, Field(discriminator="kind")] = PickOptions()

    @model_validator(mode="after")
    def _fits(self) -> PreStepOptions:
        merges = isinstance(self.select, MergeDownOptions)
        if merges != isinstance(self.apply, BlendOptions):
            raise ValueError('select "bipartite" goes with apply "merge", and no other select does')
        scoreless = merges or isinstance(self.select, PoolOptions)
        if scoreless == (self.score is not None):
            raise ValueError("merging and pooling take no score" if scoreless else f'select "{self.select.kind}" needs a score')
        if isinstance(self.select, GumbelHardOptions | BernoulliOptions) != isinstance(self.score, LearnedScoreOptions):
            raise ValueError('score "learned-mlp" goes with select "gumbel-hard" or "bernoulli", and no other does')
        if isinstance(self.apply, AttentionMergeOptions) and not self.learned:
            raise ValueError('apply "attention-merge" needs score "learned-mlp"')
        return self

    @property
    def learned(self) -> bool:
        """Whether it has weights of its own: `build` makes them, and `reduce` is not asked."""
        return isinstance(self.score, LearnedScoreOptions)

    def build(self, width: int) -> LearnedStep | None:
        """The module of a learned step over tokens of so many channels; None for any other. Raises ValueError where they do not fit."""
        if not isinstance(self.select, GumbelHardOptions | BernoulliOptions):
            return None
        return LearnedStep(width, self.select, self.apply if isinstance(self.apply, AttentionMergeOptions) else None)

    @property
    def needs_grid(self) -> bool:
        """Whether tokens must be the tower's patches, one by one."""
        return isinstance(self.score, TowerScore) or isinstance(self.select, RowsOptions | PoolOptions)

    def count(self, tokens: int, columns: int | None = None) -> int:
        """Tokens that are left of `tokens`, at most. columns: of the grid; default: a square one's."""
        select = self.select
        if isinstance(select, MergeDownOptions):
            return max(1, exact(select.keep).numerator * tokens // exact(select.keep).denominator)
        if isinstance(select, ThresholdShareOptions | GumbelHardOptions | BernoulliOptions):
            return tokens
        if isinstance(select, PoolOptions):
            columns = columns or int(tokens**0.5 + 0.5)
            rows, columns = select.left(tokens // columns, columns)
            return rows * columns
        if isinstance(select, RowsOptions):
            columns = columns or int(tokens**0.5 + 0.5)
            left = rounded(select.ratio, tokens)
            return left if select.partial == "cut" else max(columns, left // columns * columns)
        return select.count(tokens)

    def scores(self, x: Tensor, view: TowerView | None) -> Tensor | None:
        """x [P, N, C] -> [P, N] float32; None where tokens are merged."""
        score = self.score
        number = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        if isinstance(score, TowerAttentionOptions | TowerPageRankOptions):
            if view is None:
                raise ValueError("the tower's attention is not known here")
            return score.score(view)
        if isinstance(score, NormScoreOptions):
            return norms(x, score.best)
        if isinstance(score, RandomScoreOptions):
            return random_order(number, score.seed)
        if isinstance(score, UniformGridScoreOptions):
            return grid_order(number, score.columns)
        return uniform_order(number) if isinstance(score, UniformScoreOptions) else None

    def reduce(self, x: Tensor, view: TowerView | None, columns: int | None) -> tuple[Tensor, Tensor | None]:
        """x [P, N, C] -> (tokens [P, K, C], mask [P, K] where pictures keep different numbers, else None)."""
        select, apply = self.select, self.apply
        if isinstance(select, MergeDownOptions):
            assert isinstance(apply, BlendOptions)
            return merge_down(x, self.count(x.shape[1]), weighting=apply.weighting, order=apply.order), None
        if isinstance(select, PoolOptions):
            return select.pooled(x, columns or int(x.shape[1] ** 0.5 + 0.5)), None
        score = self.scores(x, view)
        assert score is not None
        if isinstance(select, ThresholdShareOptions):
            index = rows_first(score >= select.times * score.mean(1, keepdim=True))
            return gather_tokens(x, index), index >= 0
        count = self.count(x.shape[1], columns)
        if count == x.shape[1]:
            return x, None
        if isinstance(select, RowsOptions):
            return gather_tokens(x, best_rows(score, count, columns or int(x.shape[1] ** 0.5 + 0.5))), None
        return gather_tokens(x, select_top(score, count).indices), None


def learned_steps(steps: Sequence[PreStepOptions], width: int) -> nn.ModuleDict:
    """The modules of learned steps over tokens of so many channels, by number of the step. Raises ValueError where they do not fit."""
    made = {str(number): step.build(width) for number, step in enumerate(steps)}
    return nn.ModuleDict({number: module for number, module in made.items() if module is not None})


def run_steps(
    steps: Sequence[PreStepOptions], learned: nn.ModuleDict, x: Tensor, mask: Tensor | None, view: TowerView | None, columns: int | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """x [P, N, C], mask [P, N] or None, through all steps -> (tokens [P, K, C], mask [P, K] or None, penalty of the share that
    learned steps keep [P], None without such a step). Raises ValueError for a step that reads masked tokens."""
    penalty: Tensor | None = None
    for number, step in enumerate(steps):
        if mask is not None:
            raise ValueError("tokens.pre reads tokens that are all valid, and those of this connector or step are masked")
        if str(number) in learned:
            x, mask, own = learned[str(number)](x)
            penalty = own if penalty is None else penalty + own
        else:
            x, mask = step.reduce(x, view if number == 0 else None, columns)
    return x, mask, penalty


def best_rows(score: Tensor, count: int, columns: int) -> Tensor:
    """score [P, N] over a grid of so many columns -> [P, count] ascending: tokens of the best rows, of the last the first ones."""
    rows = score.unflatten(1, (-1, columns)).sum(-1)
    order = best_first(rows)
    rank = torch.sort(order, dim=1).indices  # of each row
    key = rank[:, :, None] * columns + torch.arange(columns, device=score.device)
    return torch.sort(torch.sort(key.flatten(1), dim=1).indices[:, :count], dim=1).values


def best_first(score: Tensor) -> Tensor:
    """Indices of score [..., N] by falling score, of equal ones the lower first."""
    if torch.compiler.is_exporting():  # a stable sort has no graph; the one that there is keeps equal ones in order
        return torch.sort(score, dim=-1, descending=True).indices
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


def row_varies_more(column: Tensor, row: Tensor) -> Tensor:
    """[P] bool: whether the row score varies more over the tokens of a picture; what is rounding never does."""
    column, row = column.float(), row.float()
    varies = row.var(1, correction=0).sqrt() > STEADY * row.mean(1).abs()
    return varies & (row.var(1, correction=0) > column.var(1, correction=0))


def rounded(ratio: float, tokens: int) -> int:
    """round(ratio * tokens), halves up, in exact fractions; at least 1."""
    return max(1, int(exact(ratio) * tokens + Fraction(1, 2)))
