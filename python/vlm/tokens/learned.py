"""A learned choice of tokens before the language model: a policy, a hard draw with a straight gradient, a target share.

P pictures, N tokens of a picture, K kept ones, C width. Source: core-select (the dynamic selector of LaVIT).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.ops import gather_tokens
from vlm.tokens.attention_merge import AttentionMerge, AttentionMergeOptions
from vlm.tokens.score import rows_first


class LearnedScoreOptions(Options):
    """The log probability that a token stays, by a small network over it and the mean of its picture's tokens."""

    kind: Literal["learned-mlp"] = "learned-mlp"


class GumbelHardOptions(Options):
    """In training each token stays or goes by a draw (hard Gumbel softmax); else it stays where that is the likelier. Another
    number for every picture; gradients go through the soft probabilities."""

    kind: Literal["gumbel-hard"] = "gumbel-hard"
    ratio: float = Field(1 / 3, gt=0, le=1, description="share that the penalty of the objective keep-ratio aims at")
    temperature: float = Field(1.0, gt=0, description="of the Gumbel softmax")


class BernoulliOptions(Options):
    """In training each token stays by a draw with the probability of its score; else it stays where that reaches a half."""

    kind: Literal["bernoulli"] = "bernoulli"
    ratio: float = Field(1 / 3, gt=0, le=1, description="share that the penalty of the objective keep-ratio aims at")


class Reduced(NamedTuple):
    """tokens [P, K, C] and mask [P, K], padded right; penalty [P]: distance of the kept share from its target."""

    tokens: Tensor
    mask: Tensor
    penalty: Tensor


class Policy(nn.Module):
    """Tokens to log probabilities of (stays, goes). Half of the channels are the token's own, half the picture's mean."""

    def __init__(self, width: int) -> None:
        """Raises ValueError for a width below 4 or an odd one."""
        super().__init__()
        if width < 4 or width % 2:
            raise ValueError(f"a policy over {width} channels, expected an even number from 4")
        self.entry = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.head = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(), nn.Linear(width // 4, 2)
        )

    def forward(self, x: Tensor, policy: Tensor | None = None) -> Tensor:
        """x [P, N, C] -> [P, N, 2] float32; policy [P, N]: weights of the mean over the picture's tokens, default all 1."""
        own, whole = self.entry(x).chunk(2, dim=-1)
        weights = x.new_ones(x.shape[:2]) if policy is None else policy.to(x.dtype)
        share = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
        mean = (share[:, None] @ whole).expand(-1, x.shape[1], -1)
        return F.log_softmax(self.head(torch.cat([own, mean], dim=-1)).float(), dim=-1)


class LearnedStep(nn.Module):
    """One learned step of `tokens.pre`: policy, choice, and what happens to the tokens that go. At least one token stays."""

    def __init__(
        self, width: int, select: GumbelHardOptions | BernoulliOptions, merge: AttentionMergeOptions | None = None
    ) -> None:
        super().__init__()
        self.select = select
        self.policy = Policy(width)
        self.merge = None if merge is None else AttentionMerge(merge, width)

    def forward(self, x: Tensor) -> Reduced:
        """x [P, N, C] -> its reduced tokens; a kept token is multiplied by its choice, which is 1 and carries the gradient."""
        keep = at_least_one(self.choose(logits := self.policy(x)), logits)
        index = rows_first(keep.detach() > 0.5)
        merged = x * keep[..., None].to(x.dtype) if self.merge is None else self.merge(x, keep)
        return Reduced(gather_tokens(merged, index), index >= 0, ratio_penalty(keep, self.select.ratio))

    def choose(self, logits: Tensor) -> Tensor:
        """Log probabilities [P, N, 2] -> 1 or 0 [P, N], with a gradient."""
        if not self.training:
            return gumbel_hard(logits, torch.zeros_like(logits), 1.0)
        if isinstance(self.select, BernoulliOptions):
            return bernoulli_hard(logits[..., 0].exp(), torch.rand_like(logits[..., 0]))
        return gumbel_hard(logits, -torch.empty_like(logits).exponential_().log(), self.select.temperature)


def gumbel_hard(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """logits [..., 2], Gumbel noise alike -> whether channel 0 is the greater, 1 or 0 [...], ties stay; the gradient is that of
    softmax((logits + noise) / temperature) in channel 0."""
    drawn = (logits + noise) / temperature
    soft = drawn.softmax(-1)[..., 0]
    return _straight((drawn[..., 0] >= drawn[..., 1]).to(soft.dtype), soft)


def bernoulli_hard(probability: Tensor, draw: Tensor) -> Tensor:
    """1 where draw (uniform in 0..1) is at most the probability, else 0; the gradient is that of the probability."""
    return _straight((draw <= probability).to(probability.dtype), probability)


def at_least_one(keep: Tensor, logits: Tensor) -> Tensor:
    """keep [P, N] where every row without a kept token keeps its likeliest, of equal ones the first."""
    likeliest = F.one_hot(logits[..., 0].detach().argmax(1), keep.shape[1]) if keep.shape[1] else keep.to(torch.int64)
    none = (keep.detach() < 0.5).all(1, keepdim=True)
    return keep + (none & (likeliest > 0)).to(keep.dtype)


def ratio_penalty(keep: Tensor, ratio: float) -> Tensor:
    """keep [P, N] -> (ratio - mean keep)^2 [P]."""
    return (ratio - keep.mean(1)).square()


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard`, bit for bit, with the gradient of `soft`."""
    return hard + (soft - soft.detach())
