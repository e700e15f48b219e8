"""Weights of predicted tokens, and how they are reduced: a term a token, a document or a sample.

n rows, T positions, R targets, G groups, B samples. Sources: core-ce, lwm (documents).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm.objectives.contrastive_targets import numbers_of
from vlm.objectives.vocabulary import Positions, Unit, bare, batch_layout, targets_of
from vlm.types import Batch, Layout

Per = Literal["token", "document", "sample"]


def target_weights(batch: Batch, stream: str, name: str, unit: Unit, targets: Positions) -> Tensor:
    """The weight of each target of a view, [R]: of its token, or of its sample.

    name: stream of numbers [n, T] beside the tokens of `stream`, or one a sample; where it is masked, 0. A model may lay other
    positions between the tokens: targets are matched row by row, in order. Raises ValueError for numbers that do not fit.
    """
    rows = batch[name]
    if rows.values.dim() == 1:
        weights = numbers_of(batch, name, targets.sample_index)
    else:
        tokens, plain = batch[bare(stream)], targets_of(batch_layout(batch, stream), unit)
        if rows.values.shape != tokens.values.shape or not torch.equal(rows.sample_index, tokens.sample_index):
            raise ValueError(f"stream {name!r} must have one number a token of {bare(stream)!r}, {tuple(tokens.values.shape)}, or one a "
                             f"sample, got {tuple(rows.values.shape)}")
        if not torch.equal(plain.row, targets.row):
            raise ValueError(f"stream {name!r}: the model left out targets of {stream!r}, whose weights can then not be told")
        mask = rows.mask if rows.mask.dim() == 2 else rows.mask[:, None]
        weights = plain.told(torch.where(mask, rows.values, torch.zeros_like(rows.values)))
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if not bool(((weights >= 0) & weights.isfinite()).all()):
        raise ValueError(f"stream {name!r}: weights must be finite and not negative")
    return weights


class Reduction(NamedTuple):
    """How R values become terms.

    group [R], the term of each value, None where each is its own; share [R], what a value counts in its term; weights and
    sample_index [G] of the terms.
    """

    group: Tensor | None
    share: Tensor
    weights: Tensor
    sample_index: Tensor

    def terms(self, values: Tensor) -> Tensor:
        """values [R], times `share` already where they are grouped -> [G]."""
        return values if self.group is None else values.new_zeros(len(self.weights)).index_add(0, self.group, values)

    @property
    def factors(self) -> Tensor:
        """What each value counts in the weighted sum of all, [R]."""
        return self.weights if self.group is None else self.share * self.weights[self.group]


def reduction_of(per: Per, targets: Positions, layout: Layout, samples: int, weights: Tensor | None, of_samples: bool,
                 dtype: torch.dtype) -> Reduction:
    """weights [R]: of tokens, which count within their document or sample, or `of_samples`, which count between them.

    sample: one term for each of the B samples, of weight 0 where it has no target; document: one for each that has a target.
    """
    index = targets.sample_index
    each = torch.ones(len(index), dtype=dtype, device=index.device) if weights is None else weights.to(dtype)
    if per == "token":
        return Reduction(None, each, each, index)
    if per == "sample":
        group, owner = index, torch.arange(samples, device=index.device)
    else:
        segment = targets.told(layout.segment)
        key = targets.row * (int(segment.max()) + 1 if len(segment) else 1) + segment
        _, group = torch.unique(key, return_inverse=True)
        owner = index.new_zeros(int(group.max()) + 1 if len(group) else 0)
        owner[group] = index
    total = each.new_zeros(len(owner)).index_add(0, group, each)
    counts = torch.bincount(group, minlength=len(owner))
    terms = total / counts.clamp(min=1) if of_samples else (counts > 0).to(dtype)
    return Reduction(group, each / total[group], terms, owner)
