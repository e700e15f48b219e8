"""Contrastive losses over ranks without gathering: columns travel around a ring. Source: core-infonce, core-siglip.

N ranks; rank r holds n_r pairs, x [n_r, E] and y [n_r, E]. Only products of one rank's rows with one rank's columns exist
at a time, and of either only one packed copy. Columns carry what they have gathered (their sums, their gradient) along,
and come back to their rank complete.

Gradients. Every rank gets the values of its own pairs. If each rank differentiates the sum of its own values, the
gradients that the operator returns on rank r are those of the sum over all ranks with respect to rank r's x and y (the
columns' gradients travel), and for log_scale and bias rank r's part of it. So parameter gradients are to be summed over
ranks, and divided by the number of all pairs where the loss is their mean. Under a trainer that averages over ranks,
multiply the loss by N instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from vlm.ops.backend import use_native
from vlm.ops.contrastive_native import native_pair_statistics
from vlm.ops.contrastive_pairs import (
    LSE,
    TEACHER,
    TEACHER_LSE,
    Relations,
    Teacher,
    merge_statistics,
    share_of,
    softmax_values,
)
from vlm.ops.contrastive_reference import pair_sigmoid_reference, pair_statistics_reference
from vlm.types import Communicator

Form = Literal["softmax", "sigmoid"]


def ring_contrastive(
    form: Form,
    x: Tensor,
    y: Tensor,
    log_scale: Tensor,
    bias: Tensor | None,
    communicator: Communicator,
    *,
    groups: Tensor | None = None,
    exclude: Tensor | None = None,
    smoothing: float | tuple[Tensor, Tensor] = 0.0,
    decoupled: bool = False,
    teacher: Teacher | None = None,
) -> tuple[Tensor, Tensor]:
    """x [n, E], y [n, E] of this rank -> values of its rows [n] and of its columns [n] against those of all ranks.

    Every rank must call it, and run the backward of it, in the same order. Ranks may hold different numbers of pairs,
    none included. groups, exclude: integer ids [n] of the pairs, comparable over ranks; without groups each pair is its
    own positive. teacher: embeddings [n, D] of this rank's pairs. With one rank it equals `contrastive_softmax` or
    `contrastive_sigmoid`; over ranks it does to rounding, because sums are made in another order.
    smoothing is of the softmax form: over all pairs of all ranks that take part; one eps, or those of this rank's rows [n] and of
    its columns [n].
    Raises ValueError on shapes or options that do not fit.
    """
    n = x.shape[0]
    if x.ndim != 2 or x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"ring loss: x and y must be [n, E] of one type, got {x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}")
    if form == "sigmoid" and (bias is None or smoothing or decoupled):
        raise ValueError("ring loss: the sigmoid form wants a bias, and neither smoothing nor decoupled")
    counts = [c for (c,) in communicator.gather_numbers([n])]
    ids = torch.arange(n, device=x.device) + sum(counts[: communicator.rank]) if groups is None else groups
    for name, values in (("groups", ids), ("exclude", exclude)):
        if values is not None and (values.shape != (n,) or values.is_floating_point()):
            raise ValueError(f"ring loss: {name} must be integer ids [{n}], got {values.dtype} {tuple(values.shape)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    smooth_x, smooth_y = smoothing if isinstance(smoothing, tuple) else (smoothing, smoothing)
    for eps in (smooth_x, smooth_y):
        if isinstance(eps, Tensor) and eps.shape != (n,):
            raise ValueError(f"ring loss: smoothing must be a number or [{n}], got {tuple(eps.shape)}")
    smooth = isinstance(smoothing, tuple) or smoothing > 0
    setting = _Setting(form, communicator, counts, ids, exclude, decoupled, smooth, teacher)
    shift = log_scale.new_zeros(()) if bias is None else bias
    rows, columns = _Ring.apply(x.to(wide), y.to(wide), log_scale.to(wide), shift.to(wide), setting)
    if form == "sigmoid":
        return rows[0], columns[0]
    share = 0.0 if teacher is None else teacher.share
    return softmax_values(rows, smoothing=smooth_x, share=share), softmax_values(columns, smoothing=smooth_y, share=share)


class _Setting(NamedTuple):
    form: Form
    communicator: Communicator
    counts: list[int]
    groups: Tensor
    exclude: Tensor | None
    decoupled: bool
    full: bool
    teacher: Teacher | None

    def block(self, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor, met: _Columns) -> tuple[Tensor, Tensor]:
        """Statistics of these rows and these columns, by row and by column."""
        exclude = self.exclude
        teacher = None if self.teacher is None else replace(self.teacher, y=met.teacher)
        relations = Relations(self.groups, met.groups, 0, exclude, None if exclude is None else met.exclude, self.decoupled, teacher)
        if use_native(x, y, log_scale):
            return native_pair_statistics(self.form, x, y, log_scale, bias, relations, full=self.full)
        if self.form == "softmax":
            return pair_statistics_reference(x, y, log_scale, relations)
        rows, columns = pair_sigmoid_reference(x, y, log_scale, bias, relations)
        return rows[None], columns[None]

    def around(self, columns: _Columns, meet: Callable[[_Columns], _Columns]) -> _Columns:
        """Every rank's columns meet this rank once; the own come back last."""
        size, rank = self.communicator.size, self.communicator.rank
        for hop in range(1, size + 1):
            columns = meet(columns)
            rows = self.counts[(rank - hop) % size]
            columns = _Columns(*(self.communicator.shift(t, rows) for t in columns)) if size > 1 else columns
        return columns


class _Columns(NamedTuple):
    """What travels, each [n, ...]: embeddings, ids, the teacher's embeddings, numbers by column, gradients."""

    y: Tensor
    groups: Tensor
    exclude: Tensor
    teacher: Tensor
    statistics: Tensor
    upstream: Tensor
    gradient: Tensor


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor, setting: _Setting) -> tuple[Tensor, Tensor]:
        softmax = setting.form == "softmax"
        nothing = x.new_zeros(7 if softmax else 1, x.shape[0])
        if softmax:
            nothing[LSE] = float("-inf")
            nothing[TEACHER_LSE] = float("-inf")
        total = [nothing]

        def meet(columns: _Columns) -> _Columns:
            rows, theirs = setting.block(x, columns.y, log_scale, bias, columns)
            if softmax:
                total[0] = merge_statistics(total[0], rows)
                return columns._replace(statistics=merge_statistics(columns.statistics.T, theirs).T.contiguous())
            total[0] = total[0] + rows
            return columns._replace(statistics=columns.statistics + theirs.T)

        home = setting.around(_start(y, setting, nothing.T.contiguous(), None), meet)
        columns = home.statistics.T.contiguous()
        ctx.setting = setting
        ctx.save_for_backward(x, y, log_scale, bias, total[0], columns)
        return total[0], columns

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        drows, dcolumns = gradients
        x, y, log_scale, bias, rows, columns = ctx.saved_tensors
        setting: _Setting = ctx.setting
        sums = [torch.zeros_like(t) for t in (x, log_scale, bias)]

        def meet(met: _Columns) -> _Columns:
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (x, met.y, log_scale, bias)]
                ours, theirs = setting.block(leaves[0], leaves[1], leaves[2], leaves[3], met)
                value = _weighted(setting.form, ours, rows, drows) + _weighted(setting.form, theirs, met.statistics.T, met.upstream.T)
                found = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
            for total, part in zip(sums, (found[0], found[2], found[3])):
                total += part
            return met._replace(gradient=met.gradient + found[1])

        home = setting.around(_start(y, setting, columns.T.contiguous(), dcolumns.T.contiguous()), meet)
        return sums[0], home.gradient, sums[1], sums[2], None


def _start(y: Tensor, setting: _Setting, statistics: Tensor, upstream: Tensor | None) -> _Columns:
    """This rank's columns before they travel; what is not used is empty."""
    none = y.new_zeros(y.shape[0], 0)
    exclude = setting.groups if setting.exclude is None else setting.exclude
    teacher = none if setting.teacher is None else setting.teacher.y.detach()
    first = upstream is None
    return _Columns(y, setting.groups, exclude, teacher, statistics, none if upstream is None else upstream,
                    none if first else torch.zeros_like(y))


def _weighted(form: Form, part: Tensor, whole: Tensor, upstream: Tensor) -> Tensor:
    """A scalar whose gradient is what `upstream`, the gradient of the whole's numbers, says of this part's logits."""
    if form == "sigmoid":
        return (part * upstream).sum()
    factor = torch.ones_like(whole)
    factor[LSE] = share_of(part[LSE].detach(), whole[LSE])
    factor[TEACHER] = share_of(part[TEACHER_LSE].detach(), whole[TEACHER_LSE])
    # A row without a denominator in this part has the log-sum-exp -inf, which times its factor 0 would be NaN.
    finite = torch.where(part == float("-inf"), torch.zeros_like(part), part)
    return (finite * (factor * upstream))[: TEACHER + 1].sum()
