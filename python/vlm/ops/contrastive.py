"""Contrastive losses over all pairs of two sets of embeddings, without an [R, C] tensor.

R rows (one modality), C columns (the other), E embedding width. Source: core-infonce, core-siglip.

Positives are the pairs of one group: `groups_x` [R] and `groups_y` [C] hold integer ids, and equal ids match. Without
groups the positive of row i is column i + row_offset, so that local rows can meet gathered columns. Both losses return
one value per row and one per column, so that a caller can weight samples before reducing; `0.5 * (rows + columns)`
averaged over a square problem is the usual symmetric loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import use_native
from vlm.ops.contrastive_cuda import pair_loss_cuda
from vlm.ops.contrastive_native import native_pair_loss
from vlm.ops.contrastive_reference import contrastive_sigmoid_reference, contrastive_softmax_reference
from vlm.ops.cuda_core import cuda_takes


def contrastive_softmax(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(exp(log_scale) * x y^T) against the positives, by rows and by columns (InfoNCE).

    x [R, E], y [C, E], log_scale scalar -> rows [R], columns [C], in float32 (float64 for float64 input).
    rows[i] = logsumexp_j z_ij - mean of z_ij over the positives of row i; columns[j] likewise over the rows given.
    A row (or column) without a positive has value 0 and gives no gradient. Differentiable once in x, y, log_scale.

    groups_x, groups_y: integer ids [R], [C]; groups_y may be left out when the problem is square and ids are shared.
    row_offset: without groups, the column of row 0's positive.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    groups_x, groups_y = _check(x, y, log_scale, None, groups_x, groups_y)
    x, y, log_scale = _widen(x, y, log_scale)
    if cuda_takes(x, y, log_scale):
        rows, columns, _, _ = pair_loss_cuda("softmax", x, y, log_scale, None, groups_x, groups_y, row_offset)
        return rows, columns
    if use_native(x, y, log_scale, prefer_torch=groups_x is None and _is_small(x, y)):
        rows, columns, _, _ = native_pair_loss("softmax", x, y, log_scale, None, groups_x, groups_y, row_offset)
        return rows, columns
    with torch.autocast(x.device.type, enabled=False):
        return contrastive_softmax_reference(x, y, log_scale, groups_x=groups_x, groups_y=groups_y,
                                             row_offset=row_offset)


def contrastive_sigmoid(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Sum over pairs of softplus(-t z), z = exp(log_scale) * x y^T + bias, t = +1 on positives and -1 elsewhere.

    x [R, E], y [C, E], log_scale and bias scalars -> rows [R] (sums over columns) and columns [C] (sums over the rows
    given), in float32 (float64 for float64 input). The mean of `rows` over a square problem is the SigLIP loss.
    Differentiable once in x, y, log_scale and bias. Groups, row_offset and errors as in `contrastive_softmax`.
    """
    groups_x, groups_y = _check(x, y, log_scale, bias, groups_x, groups_y)
    x, y, log_scale, bias = _widen(x, y, log_scale, bias)
    if cuda_takes(x, y, log_scale, bias):
        rows, columns, _, _ = pair_loss_cuda("sigmoid", x, y, log_scale, bias, groups_x, groups_y, row_offset)
        return rows, columns
    if use_native(x, y, log_scale, bias, prefer_torch=groups_x is None and _is_small(x, y)):
        rows, columns, _, _ = native_pair_loss("sigmoid", x, y, log_scale, bias, groups_x, groups_y, row_offset)
        return rows, columns
    with torch.autocast(x.device.type, enabled=False):
        return contrastive_sigmoid_reference(x, y, log_scale, bias, groups_x=groups_x, groups_y=groups_y,
                                             row_offset=row_offset)


def _is_small(x: Tensor, y: Tensor) -> bool:
    """Measured: while all logits fit in the cache, keeping them is cheaper than computing them twice."""
    return x.shape[0] * y.shape[0] <= 512 * 512


def _widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """At least float32, autocast or not: with a scale of 100, bfloat16 logits would move in steps of 0.4."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(t.to(wide) for t in tensors)


def _check(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
           groups_y: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Refuse what does not fit; returns both group vectors or neither."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"contrastive loss wants x [R, E] and y [C, E], got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or not x.is_floating_point():
        raise ValueError(f"contrastive loss: x and y must share one floating type, got {x.dtype} and {y.dtype}")
    for name, scalar in (("log_scale", log_scale), ("bias", bias)):
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(f"contrastive loss: {name} must be a scalar tensor, got shape {tuple(scalar.shape)}")
    if groups_x is None:
        if groups_y is not None:
            raise ValueError("contrastive loss: groups_y is given without groups_x")
        return None, None
    groups_y = groups_x if groups_y is None else groups_y
    for name, ids, length in (("groups_x", groups_x, x.shape[0]), ("groups_y", groups_y, y.shape[0])):
        if ids.shape != (length,) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"contrastive loss: {name} must be integer ids [{length}], "
                             f"got {ids.dtype} {tuple(ids.shape)}")
    return groups_x, groups_y
