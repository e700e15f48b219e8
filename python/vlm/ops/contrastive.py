"""Contrastive losses over all pairs of two sets of embeddings, without an [R, C] tensor.

R rows (one modality), C columns (the other), E embedding width. Source: core-infonce, core-siglip.

Positives are the pairs of one group: `groups_x` [R] and `groups_y` [C] hold integer ids, and equal ids match. Without
groups the positive of row i is column i + row_offset, so that local rows can meet gathered columns. Both losses return
one value per row and one per column, so that a caller can weight samples before reducing; `0.5 * (rows + columns)`
averaged over a square problem is the usual symmetric loss. A gradient is computed for what requires one and for nothing
else, so a side that is detached costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import one_device, use_native
from vlm.ops.contrastive_cuda import pair_loss_cuda
from vlm.ops.contrastive_listed import check_listed, listed_targets
from vlm.ops.contrastive_native import native_pair_statistics
from vlm.ops.contrastive_pairs import Relations, Teacher, merge_statistics, softmax_values
from vlm.ops.contrastive_reference import (
    contrastive_sigmoid_reference,
    contrastive_softmax_reference,
    pair_sigmoid_reference,
    pair_statistics_reference,
)
from vlm.ops.cuda_core import cuda_kernels_of

Smoothing = float | tuple[Tensor, Tensor]
Listed = tuple[Tensor, Tensor]


def contrastive_softmax(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
    exclude_x: Tensor | None = None,
    exclude_y: Tensor | None = None,
    decoupled: bool = False,
    smoothing: Smoothing = 0.0,
    teacher: Teacher | None = None,
    listed_x: Listed | None = None,
    listed_y: Listed | None = None,
    queue_x: Tensor | None = None,
    queue_y: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(exp(log_scale) * x y^T) against targets, by rows and by columns (InfoNCE).

    x [R, E], y [C, E], log_scale scalar -> rows [R], columns [C], in float32 (float64 for float64 input).
    rows[i] = mass_i * logsumexp_j z_ij - sum_j T_ij z_ij with mass_i = sum_j T_ij; by default T_i is uniform over the
    positives of row i. columns[j] likewise over the rows given. A row (or column) without a target has value 0 and gives
    no gradient. Differentiable once in x, y, log_scale.

    groups_x, groups_y: integer ids [R], [C]; groups_y may be left out when the problem is square and ids are shared.
    row_offset: without groups, the column of row 0's positive.
    exclude_x, exclude_y: integer ids [R], [C]; a pair of equal ids that is not positive takes no part in anything.
    decoupled: positives take no part in the denominators (DCL).
    smoothing: T = (1 - eps) T + eps * uniform over the pairs that take part; one eps, or one a row and one a column.
    teacher: T = (1 - share) T + share * softmax over the pairs of the teacher's logits, made again tile by tile.
    listed_x, listed_y: targets one by one instead of the positives: indices into y [R, K] (-1: none) with weights [R, K],
        and indices into x [C, K] with weights [C, K]; listed pairs must not be excluded.
    queue_y [Q, E], queue_x [Q', E]: further negatives of the rows, and of the columns; they get no gradient.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    relations = _relations(x, y, log_scale, None, groups_x, groups_y, row_offset, exclude_x, exclude_y, decoupled, teacher)
    if isinstance(smoothing, tuple):
        smooth_x, smooth_y = smoothing
        _check_vectors({"smoothing of the rows": (smooth_x, x.shape[0]), "smoothing of the columns": (smooth_y, y.shape[0])})
    else:
        if not 0 <= smoothing < 1:
            raise ValueError(f"contrastive loss: smoothing is {smoothing}; expected at least 0 and below 1")
        smooth_x = smooth_y = smoothing  # type: ignore[assignment]
    for name, lists, rows, columns in (("listed_x", listed_x, x.shape[0], y.shape[0]), ("listed_y", listed_y, y.shape[0], x.shape[0])):
        if lists is not None:
            check_listed(name, *lists, rows, columns)
    for name, queue in (("queue_x", queue_x), ("queue_y", queue_y)):
        if queue is not None and (queue.ndim != 2 or queue.shape[1] != x.shape[1] or teacher is not None):
            raise ValueError(f"contrastive loss: {name} must be [Q, {x.shape[1]}] and goes with no teacher, got "
                             f"{tuple(queue.shape)}" + ("" if teacher is None else " and a teacher"))
    smooth = isinstance(smoothing, tuple) or smoothing > 0
    simple = relations.plain and not smooth and listed_x is listed_y is queue_x is queue_y is None
    native = use_native(x, y, log_scale, prefer_torch=simple and groups_x is None and _is_small(x, y), cuda=lambda: simple)
    on_device = native and cuda_kernels_of(x) is not None
    x, y, log_scale = _widen(native and not on_device, x, y, log_scale)
    if on_device:
        rows, columns, _, _ = pair_loss_cuda("softmax", x, y, log_scale, None, relations.groups_x, relations.groups_y, row_offset)
        return rows, columns
    with torch.autocast(x.device.type, enabled=False):
        if simple and not native:
            return contrastive_softmax_reference(x, y, log_scale, groups_x=relations.groups_x, groups_y=relations.groups_y,
                                                 row_offset=row_offset)
        row_statistics, column_statistics = _statistics(native, x, y, log_scale, relations, smooth)
        if queue_y is not None:
            row_statistics = merge_statistics(row_statistics, _against_queue(native, x, queue_y, log_scale, smooth))
        if queue_x is not None:
            column_statistics = merge_statistics(column_statistics, _against_queue(native, y, queue_x, log_scale, smooth))
        share = 0.0 if teacher is None else teacher.share
        wide_x, wide_y = (x, y) if listed_x is listed_y is None else (x.to(log_scale.dtype), y.to(log_scale.dtype))
        row_list = None if listed_x is None else listed_targets(wide_x, wide_y, log_scale, *listed_x)
        column_list = None if listed_y is None else listed_targets(wide_y, wide_x, log_scale, *listed_y)
        return (softmax_values(row_statistics, smoothing=smooth_x, share=share, listed=row_list),
                softmax_values(column_statistics, smoothing=smooth_y, share=share, listed=column_list))


def contrastive_sigmoid(
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    groups_x: Tensor | None = None,
    groups_y: Tensor | None = None,
    row_offset: int = 0,
    exclude_x: Tensor | None = None,
    exclude_y: Tensor | None = None,
    labels: tuple[Tensor, Tensor] | None = None,
    negative_weight: float = 1.0,
    teacher: Teacher | None = None,
    listed: Listed | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum over pairs of the binary cross-entropy of sigmoid(z), z = exp(log_scale) * x y^T + bias, against labels p.

    x [R, E], y [C, E], log_scale and bias scalars -> rows [R] (sums over columns) and columns [C] (sums over the rows
    given), in float32 (float64 for float64 input). By default p is 1 on positives and 0 elsewhere, and the mean of `rows`
    over a square problem is the SigLIP loss. Differentiable once in x, y, log_scale and bias.

    Groups, row_offset, exclusions and errors as in `contrastive_softmax`.
    labels: p of the positives and of the other pairs of each row, [R] and [R].
    negative_weight: factor of the terms of pairs that are not positive.
    teacher: p = (1 - share) p + share * sigmoid of the teacher's logit.
    listed: indices into y [R, K] (-1: none) and what is added to p there, [R, K].
    """
    relations = _relations(x, y, log_scale, bias, groups_x, groups_y, row_offset, exclude_x, exclude_y, False, teacher)
    if labels is not None:
        _check_vectors({"labels of positives": (labels[0], x.shape[0]), "labels of the others": (labels[1], x.shape[0])})
    if listed is not None:
        check_listed("listed", *listed, x.shape[0], y.shape[0])
    if negative_weight < 0:
        raise ValueError(f"contrastive loss: negative_weight is {negative_weight}; expected at least 0")
    simple = relations.plain and labels is None and negative_weight == 1 and listed is None
    native = use_native(x, y, log_scale, bias, prefer_torch=simple and groups_x is None and _is_small(x, y), cuda=lambda: simple)
    on_device = native and cuda_kernels_of(x) is not None
    x, y, log_scale, bias = _widen(native and not on_device, x, y, log_scale, bias)
    stacked = None if labels is None else torch.stack([p.detach().to(log_scale.dtype) for p in labels])
    if on_device:
        rows, columns, _, _ = pair_loss_cuda("sigmoid", x, y, log_scale, bias, relations.groups_x, relations.groups_y, row_offset)
        return rows, columns
    with torch.autocast(x.device.type, enabled=False):
        if simple and not native:
            return contrastive_sigmoid_reference(x, y, log_scale, bias, groups_x=relations.groups_x,
                                                 groups_y=relations.groups_y, row_offset=row_offset)
        if native:
            rows, columns = (s[0] for s in native_pair_statistics(
                "sigmoid", x, y, log_scale, bias, relations, labels=stacked, negative_weight=negative_weight))
        else:
            rows, columns = pair_sigmoid_reference(x, y, log_scale, bias, relations, stacked, negative_weight)
        if listed is None:
            return rows, columns
        index, weight = listed
        wide_x, wide_y = x.to(log_scale.dtype), y.to(log_scale.dtype)
        # More label dp takes dp * z off a term. By columns the same pairs are counted from the other side.
        total, mass = listed_targets(wide_x, wide_y, log_scale, index, weight)
        rows = rows - total - bias * mass
        flat, live = index.reshape(-1), index.reshape(-1) >= 0
        owner = torch.arange(x.shape[0], device=x.device).repeat_interleave(index.shape[1])[live]
        each = (listed_targets(wide_x[owner], wide_y, log_scale, flat[live][:, None], weight.reshape(-1)[live][:, None]))
        return rows, columns.index_add(0, flat[live], -(each[0] + bias * each[1]))


def _statistics(native: bool, x: Tensor, y: Tensor, log_scale: Tensor, relations: Relations,
                full: bool) -> tuple[Tensor, Tensor]:
    if native:
        return native_pair_statistics("softmax", x, y, log_scale, None, relations, full=full)
    return pair_statistics_reference(x, y, log_scale, relations)


def _against_queue(native: bool, x: Tensor, queue: Tensor, log_scale: Tensor, full: bool) -> Tensor:
    """Statistics [7, R] of rows against columns that hold no positive and get no gradient."""
    relations = Relations(row_offset=queue.shape[0])  # beyond the last column: nothing is positive
    queue = queue.detach().to(x.dtype)
    if native:
        return native_pair_statistics("softmax", x, queue, log_scale, None, relations, full=full, want_columns=False)[0]
    return pair_statistics_reference(x, queue, log_scale, relations)[0]


def _is_small(x: Tensor, y: Tensor) -> bool:
    """Measured: while all logits fit in the cache, keeping them is cheaper than computing them twice."""
    return x.shape[0] * y.shape[0] <= 512 * 512


def _widen(native: bool, x: Tensor, y: Tensor, *scalars: Tensor) -> tuple[Tensor, ...]:
    """At least float32, autocast or not: with a scale of 100, bfloat16 logits would move in steps of 0.4. The native core
    reads bfloat16 as it lies and makes float32 logits of it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if native and x.dtype == torch.bfloat16:
        return (x, y, *(s.to(wide) for s in scalars))
    return tuple(t.to(wide) for t in (x, y, *scalars))


def _check_vectors(vectors: dict[str, tuple[Tensor, int]]) -> None:
    for name, (vector, length) in vectors.items():
        if vector.shape != (length,) or not vector.is_floating_point():
            raise ValueError(f"contrastive loss: {name} must be [{length}], got {vector.dtype} {tuple(vector.shape)}")


def _relations(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None, groups_y: Tensor | None,
               row_offset: int, exclude_x: Tensor | None, exclude_y: Tensor | None, decoupled: bool,
               teacher: Teacher | None) -> Relations:
    """Refuse what does not fit."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"contrastive loss wants x [R, E] and y [C, E], got {tuple(x.shape)} and {tuple(y.shape)}")
    if x.dtype != y.dtype or not x.is_floating_point():
        raise ValueError(f"contrastive loss: x and y must share one floating type, got {x.dtype} and {y.dtype}")
    for name, scalar in (("log_scale", log_scale), ("bias", bias)):
        if scalar is not None and scalar.numel() != 1:
            raise ValueError(f"contrastive loss: {name} must be a scalar tensor, got shape {tuple(scalar.shape)}")
    one_device("contrastive loss", x, y, groups_x, groups_y, exclude_x, exclude_y)
    ids: list[Tensor | None] = []
    for kind, first, second in (("groups", groups_x, groups_y), ("exclude", exclude_x, exclude_y)):
        if first is None:
            if second is not None:
                raise ValueError(f"contrastive loss: {kind}_y is given without {kind}_x")
            ids += [None, None]
            continue
        second = first if second is None else second
        for name, values, length in ((f"{kind}_x", first, x.shape[0]), (f"{kind}_y", second, y.shape[0])):
            if values.shape != (length,) or values.is_floating_point() or values.dtype == torch.bool:
                raise ValueError(f"contrastive loss: {name} must be integer ids [{length}], "
                                 f"got {values.dtype} {tuple(values.shape)}")
        ids += [first, second]
    if teacher is not None and (teacher.x.ndim != 2 or teacher.y.ndim != 2 or teacher.x.shape[1] != teacher.y.shape[1]
                                or teacher.x.shape[0] != x.shape[0] or teacher.y.shape[0] != y.shape[0]
                                or not 0 <= teacher.share <= 1):
        raise ValueError(f"contrastive loss: the teacher must be [{x.shape[0]}, D] and [{y.shape[0]}, D] with a share of 0 "
                         f"to 1, got {tuple(teacher.x.shape)}, {tuple(teacher.y.shape)} and {teacher.share}")
    return Relations(ids[0], ids[1], row_offset, ids[2], ids[3], decoupled, teacher)
