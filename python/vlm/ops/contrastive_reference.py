"""Contrastive losses over all pairs in plain torch: the twins of the tiled native kernels. They hold [R, C] tensors.

R rows (one modality), C columns (the other), E embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.ops.contrastive_pairs import Relations, softmax_values


def positive_pairs(x: Tensor, y: Tensor, groups_x: Tensor | None, groups_y: Tensor | None, row_offset: int) -> Tensor:
    """Boolean [R, C]: true where row i and column j are of one group, by default where j = i + row_offset."""
    if groups_x is None or groups_y is None:
        i = torch.arange(x.shape[0], device=x.device) + row_offset
        j = torch.arange(y.shape[0], device=x.device)
        return i[:, None] == j[None, :]
    return groups_x[:, None] == groups_y[None, :]


def pair_masks(x: Tensor, y: Tensor, relations: Relations) -> tuple[Tensor, Tensor, Tensor | None]:
    """Positive [R, C], kept [R, C], and the teacher's logits."""
    positive = positive_pairs(x, y, relations.groups_x, relations.groups_y, relations.row_offset)
    excluded = torch.zeros_like(positive)
    if relations.exclude_x is not None and relations.exclude_y is not None:
        excluded = relations.exclude_x[:, None] == relations.exclude_y[None, :]
    teacher = relations.teacher
    if teacher is None:
        return positive, positive | ~excluded, None
    with torch.no_grad():
        u = teacher.scale * (teacher.x.to(x.dtype) @ teacher.y.to(x.dtype).T) + teacher.bias
    return positive, positive | ~(excluded | (u > teacher.threshold)), u


def matrix_statistics(z: Tensor, positive: Tensor, kept: Tensor, u: Tensor | None, decoupled: bool, axis: int) -> Tensor:
    """Statistics [7, n] of given logits z [R, C], of rows (axis 1) or columns (axis 0)."""
    if z.shape[axis] == 0:
        empty = z.sum(axis)
        return torch.stack([empty + float("-inf"), *([empty] * 5), empty + (0.0 if u is None else float("-inf"))])
    zero = torch.zeros_like(z)
    counted = kept & ~positive if decoupled else kept
    inside = torch.where(kept, z, zero)
    out = [_logsumexp(z, counted, axis), torch.where(positive, z, zero).sum(axis), inside.sum(axis)]
    teacher, teacher_lse = torch.zeros_like(out[0]), torch.zeros_like(out[0])
    if u is not None:
        teacher_lse = _logsumexp(u, kept, axis)
        known = torch.where(teacher_lse == float("-inf"), 0.0, teacher_lse).unsqueeze(axis)
        teacher = (torch.where(kept, torch.exp(torch.where(kept, u, known) - known), zero) * inside).sum(axis)
    counts = [positive.sum(axis).to(z.dtype), kept.sum(axis).to(z.dtype)]
    return torch.stack([*out, teacher, *counts, teacher_lse])


def _logsumexp(z: Tensor, counted: Tensor, axis: int) -> Tensor:
    """-inf, without a gradient, where nothing counts."""
    some = counted.any(axis, keepdim=True)
    z = torch.where(counted, z, torch.full_like(z, float("-inf")))
    out = torch.logsumexp(torch.where(some, z, torch.zeros_like(z)), axis)
    return torch.where(some.squeeze(axis), out, torch.full_like(out, float("-inf")))


def pair_statistics_reference(x: Tensor, y: Tensor, log_scale: Tensor, relations: Relations) -> tuple[Tensor, Tensor]:
    """x [R, E], y [C, E] -> statistics of rows [7, R] and of columns [7, C]."""
    z = log_scale.exp() * (x @ y.T)
    masks = pair_masks(x, y, relations)
    return (matrix_statistics(z, *masks, relations.decoupled, 1), matrix_statistics(z, *masks, relations.decoupled, 0))


def contrastive_softmax_reference(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """The plain case of `vlm.ops.contrastive_softmax`: x [R, E], y [C, E] -> values by row [R] and by column [C]."""
    if groups_x is None and x.shape[0] > 0 and y.shape[0] > 0:
        z = log_scale.exp() * (x @ y.T)
        return _one_positive(z, row_offset), _one_positive(z.T, -row_offset)
    rows, columns = pair_statistics_reference(x, y, log_scale, Relations(groups_x, groups_y, row_offset))
    return softmax_values(rows), softmax_values(columns)


def _one_positive(z: Tensor, offset: int) -> Tensor:
    """Cross-entropy of each row against column i + offset; 0 where that lies outside."""
    label = torch.arange(z.shape[0], device=z.device) + offset
    label = torch.where((label >= 0) & (label < z.shape[1]), label, -100)
    return F.cross_entropy(z, label, reduction="none", ignore_index=-100)


def matrix_sigmoid(
    z: Tensor, positive: Tensor, kept: Tensor, u: Tensor | None, share: float, labels: Tensor | None, negative_weight: float
) -> Tensor:
    """Terms [R, C] of the sigmoid form for given logits; labels [2, R]: of positives, of the others."""
    ones = torch.ones_like(z)
    high, low = (ones, torch.zeros_like(z)) if labels is None else (labels[0][:, None] * ones, labels[1][:, None] * ones)
    label = torch.where(positive, high, low)
    if u is not None and share:
        label = (1 - share) * label + share * torch.sigmoid(u)
    # softplus of the signed logit where the label is 0 or 1, so that nothing cancels there.
    terms = label * F.softplus(-z) + (1 - label) * F.softplus(z)
    terms = torch.where(positive, terms, terms * negative_weight)
    return torch.where(kept, terms, torch.zeros_like(terms))


def pair_sigmoid_reference(
    x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor, relations: Relations, labels: Tensor | None = None,
    negative_weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """x [R, E], y [C, E] -> sums of terms by row [R] and by column [C]."""
    z = log_scale.exp() * (x @ y.T) + bias
    share = 0.0 if relations.teacher is None else relations.teacher.share
    terms = matrix_sigmoid(z, *pair_masks(x, y, relations), share, labels, negative_weight)
    return terms.sum(1), terms.sum(0)


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
    """The plain case of `vlm.ops.contrastive_sigmoid`: x [R, E], y [C, E] -> values by row [R] and by column [C]."""
    z = log_scale.exp() * (x @ y.T) + bias
    positive = positive_pairs(x, y, groups_x, groups_y, row_offset)
    terms = F.softplus(torch.where(positive, -z, z))
    return terms.sum(1), terms.sum(0)
