"""What a contrastive operator may be told about pairs, and the numbers that target distributions are made of.

R rows, C columns, D width of the teacher's embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LSE, POSITIVE, TOTAL, TEACHER, COUNT, KEPT, TEACHER_LSE = range(7)
"""Rows of a table of statistics [7, n]: logsumexp of the denominator; sums of logits over positives and over kept pairs;
the teacher's expectation of the logit; numbers of positives and of kept pairs; the teacher's logsumexp. The first four
are differentiable."""


@dataclass(frozen=True)
class Teacher:
    """Soft targets from embeddings that give no gradient: logits scale * x y^T + bias over the same pairs.

    x [R, D], y [C, D]. share: how much of the target is the teacher's, the rest is the positives' (momentum targets
    alpha T + (1 - alpha) I); 0 leaves only what `similar` uses. similar: a pair that is not positive and whose product
    <x_i, y_j> is above it is excluded. bias is of the sigmoid form.
    """

    x: Tensor
    y: Tensor
    scale: float = 1.0
    share: float = 1.0
    bias: float = 0.0
    similar: float | None = None

    @property
    def threshold(self) -> float:
        """`similar` in units of the teacher's logits."""
        return float("inf") if self.similar is None else self.similar * self.scale + self.bias


class Relations(NamedTuple):
    """Which pairs are positive, and which take no part; see `vlm.ops.contrastive_softmax`."""

    groups_x: Tensor | None = None
    groups_y: Tensor | None = None
    row_offset: int = 0
    exclude_x: Tensor | None = None
    exclude_y: Tensor | None = None
    decoupled: bool = False
    teacher: Teacher | None = None

    @property
    def plain(self) -> bool:
        return self.exclude_x is None and not self.decoupled and self.teacher is None


def merge_statistics(a: Tensor, b: Tensor) -> Tensor:
    """Statistics [7, n] of one row against two sets of columns -> against both."""
    both = a + b
    lse, teacher_lse = _logaddexp(a[LSE], b[LSE]), _logaddexp(a[TEACHER_LSE], b[TEACHER_LSE])
    teacher = a[TEACHER] * share_of(a[TEACHER_LSE], teacher_lse) + b[TEACHER] * share_of(b[TEACHER_LSE], teacher_lse)
    return torch.stack([lse, both[POSITIVE], both[TOTAL], teacher, both[COUNT], both[KEPT], teacher_lse])


def share_of(part: Tensor, whole: Tensor) -> Tensor:
    """exp(part - whole) of two logsumexps; 0 where the part is empty."""
    empty = part == float("-inf")
    return torch.where(empty, 0.0, torch.exp(torch.where(empty, 0.0, part - whole)))


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """logaddexp whose gradient is 0, not NaN, where both are -inf."""
    nothing = (a == float("-inf")) & (b == float("-inf"))
    zero = torch.zeros_like(a)
    return torch.where(nothing, float("-inf"), torch.logaddexp(torch.where(nothing, zero, a), torch.where(nothing, zero, b)))


def softmax_values(
    statistics: Tensor,
    *,
    smoothing: float | Tensor = 0.0,
    share: float = 0.0,
    listed: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[7, n] -> cross-entropies [n] against T = (1 - eps) ((1 - share) hard + share * teacher) + eps * uniform.

    hard is uniform over the positives, or `listed` = (sum of T z, sum of T) of targets given one by one. uniform is over
    the kept pairs, with the mass of the rest of T. A row of mass 0, or without a denominator, has the value 0.
    """
    lse, positive, total, teacher, count, kept, _ = statistics.unbind(0)
    if listed is None:
        target, mass = positive / count.clamp(min=1), (count > 0).to(lse.dtype)
    else:
        target, mass = listed
    if share:
        target, mass = (1 - share) * target + share * teacher, (1 - share) * mass + share * (kept > 0).to(lse.dtype)
    if isinstance(smoothing, Tensor) or smoothing:
        target = (1 - smoothing) * target + smoothing * mass * total / kept.clamp(min=1)
    nothing = lse == float("-inf")
    return torch.where(nothing, torch.zeros_like(lse), mass * torch.where(nothing, 0.0, lse) - target)
