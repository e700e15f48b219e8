"""The native contrastive losses as torch operators. R rows, C columns, E width; x and y float32 or bfloat16 on the CPU."""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core
from vlm.ops.contrastive_pairs import Relations

NUMBERS, GRADIENTS = {"softmax": 7, "sigmoid": 1}, {"softmax": 4, "sigmoid": 1}


def native_pair_statistics(
    loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, relations: Relations, *, full: bool = False,
    labels: Tensor | None = None, negative_weight: float = 1.0, want_columns: bool = True
) -> tuple[Tensor, Tensor]:
    """Statistics by row [7, R] and by column [7, C] (sigmoid: [1, R] and [1, C]), in float32; see contrastive.hpp."""
    teacher = relations.teacher
    tx, ty = (None, None) if teacher is None else (teacher.x.detach().float(), teacher.y.detach().float())
    numbers = [1.0, 0.0, 0.0, float("inf"), negative_weight] if teacher is None else [
        teacher.scale, teacher.bias, teacher.share, teacher.threshold, negative_weight]
    rows, columns = native_pair_loss(
        loss, x, y, log_scale, bias, relations.groups_x, relations.groups_y, relations.row_offset, relations.exclude_x,
        relations.exclude_y, labels, tx, ty, numbers, [relations.decoupled, full, want_columns])
    return rows, columns


def _readable(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


class _Call:
    """The arguments shared by both kernels; holds the tensors whose memory they point to."""

    def __init__(self, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
                 groups_y: Tensor | None, row_offset: int, exclude_x: Tensor | None, exclude_y: Tensor | None,
                 labels: Tensor | None, teacher_x: Tensor | None, teacher_y: Tensor | None, numbers: list[float],
                 flags: list[bool]) -> None:
        self.alive: list[Tensor] = []
        scale, shift, share, similar, negative_weight = numbers
        labels = None if labels is None else labels.float().contiguous()
        row_ids, column_ids = self._ids(groups_x, groups_y)
        row_excluded, column_excluded = self._ids(exclude_x, exclude_y)
        self.problem: dict[str, Any] = {
            "rows": x.shape[0], "columns": y.shape[0], "width": x.shape[1], "half": x.dtype == torch.bfloat16,
            "x": self._matrix(x), "y": self._matrix(y), "scale": float(log_scale.exp()),
            "bias": 0.0 if bias is None else float(bias), "row_ids": row_ids, "column_ids": column_ids,
            "row_offset": row_offset, "row_excluded": row_excluded, "column_excluded": column_excluded,
            "decoupled": flags[0], "full": flags[1], "negative_weight": negative_weight,
            "positive_label": self._address(None if labels is None else labels[0]),
            "negative_label": self._address(None if labels is None else labels[1]),
            "teacher_width": 0 if teacher_x is None else teacher_x.shape[1],
            "teacher_x": self._matrix(teacher_x), "teacher_y": self._matrix(teacher_y), "teacher_scale": scale,
            "teacher_bias": shift, "teacher_share": share, "similar": similar,
        }

    def _address(self, t: Tensor | None) -> int:
        """An empty tensor has no address, yet it is given."""
        if t is None:
            return 0
        t = t if t.numel() else torch.zeros(1, dtype=t.dtype)
        self.alive.append(t)
        return t.data_ptr()

    def _ids(self, x: Tensor | None, y: Tensor | None) -> tuple[int, int]:
        if x is None or y is None:
            return 0, 0
        return self._address(x.to(torch.int64).contiguous()), self._address(y.to(torch.int64).contiguous())

    def _matrix(self, t: Tensor | None) -> tuple[int, int]:
        if t is None:
            return 0, 0
        t = _readable(t)
        return self._address(t), t.stride(0)


@torch.library.custom_op("vlm::pair_loss", mutates_args=(), device_types="cpu")
def native_pair_loss(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Optional[Tensor],  # noqa: UP045
                     groups_x: Optional[Tensor], groups_y: Optional[Tensor], row_offset: int,  # noqa: UP045
                     exclude_x: Optional[Tensor], exclude_y: Optional[Tensor], labels: Optional[Tensor],  # noqa: UP045
                     teacher_x: Optional[Tensor], teacher_y: Optional[Tensor],  # noqa: UP045
                     numbers: list[float], flags: list[bool]) -> tuple[Tensor, Tensor]:
    """numbers: the teacher's scale, bias, share and threshold, weight of negatives. flags: decoupled, full, columns."""
    call = _Call(x, y, log_scale, bias, groups_x, groups_y, row_offset, exclude_x, exclude_y, labels, teacher_x, teacher_y,
                 numbers, flags)
    rows, columns = _outputs(loss, x, y, flags)
    core().pair_forward(loss, call.problem, rows.data_ptr(), columns.data_ptr() if flags[2] else 0, torch.get_num_threads())
    return rows, columns


def _outputs(loss: str, x: Tensor, y: Tensor, flags: list[bool]) -> tuple[Tensor, Tensor]:
    n = NUMBERS[loss]
    return (x.new_empty((n, x.shape[0]), dtype=torch.float32),
            x.new_empty((n, y.shape[0] if flags[2] else 0), dtype=torch.float32))


@native_pair_loss.register_fake
def _(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
      groups_y: Tensor | None, row_offset: int, exclude_x: Tensor | None, exclude_y: Tensor | None, labels: Tensor | None,
      teacher_x: Tensor | None, teacher_y: Tensor | None, numbers: list[float], flags: list[bool]) -> tuple[Tensor, Tensor]:
    return _outputs(loss, x, y, flags)


@torch.library.custom_op("vlm::pair_loss_backward", mutates_args=(), device_types="cpu")
def native_pair_loss_backward(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Optional[Tensor],  # noqa: UP045
                              groups_x: Optional[Tensor], groups_y: Optional[Tensor], row_offset: int,  # noqa: UP045
                              exclude_x: Optional[Tensor], exclude_y: Optional[Tensor],  # noqa: UP045
                              labels: Optional[Tensor], teacher_x: Optional[Tensor],  # noqa: UP045
                              teacher_y: Optional[Tensor], numbers: list[float], flags: list[bool],  # noqa: UP045
                              rows: Tensor, columns: Tensor, drows: Tensor, dcolumns: Tensor, want_x: bool,
                              want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and y (empty unless wanted), log_scale and bias, in float32. Has no gradient of its own."""
    call = _Call(x, y, log_scale, bias, groups_x, groups_y, row_offset, exclude_x, exclude_y, labels, teacher_x, teacher_y,
                 numbers, flags)
    n = GRADIENTS[loss]
    drows, dcolumns = drows[:n].contiguous(), dcolumns[:n].contiguous()
    dx, dy, dlog_scale, dbias = _gradients(x, y, log_scale, bias, want_x, want_y)
    scale_gradient, bias_gradient = core().pair_backward(
        loss, call.problem, rows.data_ptr(), columns.data_ptr(), drows.data_ptr(), dcolumns.data_ptr() if flags[2] else 0,
        (dx.data_ptr(), x.shape[1]) if want_x else (0, 0), (dy.data_ptr(), x.shape[1]) if want_y else (0, 0),
        torch.get_num_threads())
    dlog_scale.fill_(scale_gradient)
    dbias.fill_(bias_gradient)
    return dx, dy, dlog_scale, dbias


def _gradients(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, want_x: bool,
               want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape if want_x else (0,), y.shape if want_y else (0,), log_scale.shape, (0,) if bias is None else bias.shape)
    dx, dy, dlog_scale, dbias = (x.new_empty(shape, dtype=torch.float32) for shape in shapes)
    return dx, dy, dlog_scale, dbias


@native_pair_loss_backward.register_fake
def _(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
      groups_y: Tensor | None, row_offset: int, exclude_x: Tensor | None, exclude_y: Tensor | None, labels: Tensor | None,
      teacher_x: Tensor | None, teacher_y: Tensor | None, numbers: list[float], flags: list[bool], rows: Tensor,
      columns: Tensor, drows: Tensor, dcolumns: Tensor, want_x: bool, want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, y, log_scale, bias, want_x, want_y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, *tensors, numbers, flags = inputs
    ctx.row_offset = tensors.pop(6)
    ctx.save_for_backward(*tensors, *output)
    ctx.loss, ctx.numbers, ctx.flags = loss, numbers, flags


def _backward(ctx: Any, drows: Tensor, dcolumns: Tensor) -> tuple[Tensor | None, ...]:
    x, y, log_scale, bias, groups_x, groups_y, *others, rows, columns = ctx.saved_tensors
    _, want_x, want_y, want_scale, want_bias, *_ = ctx.needs_input_grad
    dx, dy, dlog_scale, dbias = native_pair_loss_backward(
        ctx.loss, x, y, log_scale, bias, groups_x, groups_y, ctx.row_offset, *others, ctx.numbers, ctx.flags, rows, columns,
        drows, dcolumns, want_x, want_y)
    return (None, dx.to(x.dtype) if want_x else None, dy.to(y.dtype) if want_y else None,
            dlog_scale if want_scale else None, dbias if bias is not None and want_bias else None, *([None] * 10))


native_pair_loss.register_autograd(_backward, setup_context=_save)
