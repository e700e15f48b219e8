"""Contrastive losses over all pairs in plain torch: the twins of the tiled native kernels. They hold [R, C] tensors.

R rows (one modality), C columns (the other), E embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def positive_pairs(x: Tensor, y: Tensor, groups_x: Tensor | None, groups_y: Tensor | None, row_offset: int) -> Tensor:
    """Boolean [R, C]: true where row i and column j are of one group, by default where j = i + row_offset."""
    if groups_x is None or groups_y is None:
        i = torch.arange(x.shape[0], device=x.device) + row_offset
        j = torch.arange(y.shape[0], device=x.device)
        return i[:, None] == j[None, :]
    return groups_x[:, None] == groups_y[None, :]


def contrastive_softmax_reference(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.contrastive_softmax`: x [R, E], y [C, E] -> values by row [R] and by column [C]."""
    z = log_scale.exp() * (x @ y.T)
    if groups_x is None and z.shape[0] > 0 and z.shape[1] > 0:
        return _one_positive(z, row_offset), _one_positive(z.T, -row_offset)
    positive = positive_pairs(x, y, groups_x, groups_y, row_offset)
    return _cross_entropy(z, positive, 1), _cross_entropy(z, positive, 0)


def _one_positive(z: Tensor, offset: int) -> Tensor:
    """Cross-entropy of each row against column i + offset; 0 where that lies outside."""
    label = torch.arange(z.shape[0], device=z.device) + offset
    label = torch.where((label >= 0) & (label < z.shape[1]), label, -100)
    return F.cross_entropy(z, label, reduction="none", ignore_index=-100)


def _cross_entropy(z: Tensor, positive: Tensor, axis: int) -> Tensor:
    count = positive.sum(axis)
    if z.shape[axis] == 0:
        return z.sum(axis)
    target = torch.where(positive, z, torch.zeros_like(z)).sum(axis) / count.clamp(min=1)
    return torch.where(count > 0, torch.logsumexp(z, axis) - target, torch.zeros_like(target))


def contrastive_sigmoid_reference(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.contrastive_sigmoid`: x [R, E], y [C, E] -> values by row [R] and by column [C]."""
    z = log_scale.exp() * (x @ y.T) + bias
    positive = positive_pairs(x, y, groups_x, groups_y, row_offset)
    terms = F.softplus(torch.where(positive, -z, z))
    return terms.sum(1), terms.sum(0)
