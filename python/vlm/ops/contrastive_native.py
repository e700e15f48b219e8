"""The native contrastive losses as torch operators. R rows, C columns, E width; all float32 on the CPU."""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core


def _readable(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _problem(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
             groups_y: Tensor | None, row_offset: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    x, y = _readable(x), _readable(y)
    alive = [x, y]
    ids = [0, 0]
    if groups_x is not None and groups_y is not None:
        groups = [groups_x.to(torch.int64).contiguous(), groups_y.to(torch.int64).contiguous()]
        # An empty tensor has no address, yet its other side still has groups.
        groups = [g if g.numel() else torch.zeros(1, dtype=torch.int64) for g in groups]
        ids = [g.data_ptr() for g in groups]
        alive += groups
    arguments: dict[str, Any] = {
        "loss": loss, "rows": x.shape[0], "columns": y.shape[0], "width": x.shape[1],
        "x": (x.data_ptr(), x.stride(0)), "y": (y.data_ptr(), y.stride(0)), "scale": float(log_scale.exp()),
        "bias": 0.0 if bias is None else float(bias), "row_ids": ids[0], "column_ids": ids[1],
        "row_offset": row_offset, "threads": torch.get_num_threads(),
    }
    return arguments, alive


@torch.library.custom_op("vlm::pair_loss", mutates_args=(), device_types="cpu")
def native_pair_loss(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Optional[Tensor],  # noqa: UP045
                     groups_x: Optional[Tensor], groups_y: Optional[Tensor],  # noqa: UP045
                     row_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss "softmax" or "sigmoid", x [R, E], y [C, E] -> row values [R], column values [C], and for softmax the saved
    log-sum-exps [R] and [C] (empty for sigmoid), through which no gradient flows."""
    arguments, _alive = _problem(loss, x, y, log_scale, bias, groups_x, groups_y, row_offset)
    rows, columns, row_lse, column_lse = _outputs(loss, x, y)
    core().pair_forward(**arguments, row_values=rows.data_ptr(), column_values=columns.data_ptr(),
                        row_lse=row_lse.data_ptr(), column_lse=column_lse.data_ptr())
    return rows, columns, row_lse, column_lse


def _outputs(loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = loss == "softmax"
    return (x.new_empty(x.shape[0]), x.new_empty(y.shape[0]), x.new_empty(x.shape[0] if saved else 0),
            x.new_empty(y.shape[0] if saved else 0))


@native_pair_loss.register_fake
def _(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
      groups_y: Tensor | None, row_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(loss, x, y)


@torch.library.custom_op("vlm::pair_loss_backward", mutates_args=(), device_types="cpu")
def native_pair_loss_backward(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Optional[Tensor],  # noqa: UP045
                              groups_x: Optional[Tensor], groups_y: Optional[Tensor],  # noqa: UP045
                              row_offset: int, row_lse: Tensor, column_lse: Tensor, drows: Tensor, dcolumns: Tensor,
                              want_x: bool, want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and y (empty unless wanted), log_scale and bias. Has no gradient of its own."""
    arguments, _alive = _problem(loss, x, y, log_scale, bias, groups_x, groups_y, row_offset)
    drows, dcolumns = drows.contiguous(), dcolumns.contiguous()
    dx, dy, dlog_scale, dbias = _gradients(x, y, log_scale, bias, want_x, want_y)
    scale_gradient, bias_gradient = core().pair_backward(
        **arguments, row_lse=row_lse.data_ptr(), column_lse=column_lse.data_ptr(), row_gradient=drows.data_ptr(),
        column_gradient=dcolumns.data_ptr(), dx=(dx.data_ptr(), x.shape[1]) if want_x else (0, 0),
        dy=(dy.data_ptr(), x.shape[1]) if want_y else (0, 0),
    )
    dlog_scale.fill_(scale_gradient)
    dbias.fill_(bias_gradient)
    return dx, dy, dlog_scale, dbias


def _gradients(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, want_x: bool,
               want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape if want_x else (0,)), y.new_empty(y.shape if want_y else (0,)),
            x.new_empty(log_scale.shape), x.new_empty((0,) if bias is None else bias.shape))


@native_pair_loss_backward.register_fake
def _(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
      groups_y: Tensor | None, row_offset: int, row_lse: Tensor, column_lse: Tensor, drows: Tensor, dcolumns: Tensor,
      want_x: bool, want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(x, y, log_scale, bias, want_x, want_y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, x, y, log_scale, bias, groups_x, groups_y, row_offset = inputs
    ctx.save_for_backward(x, y, log_scale, bias, groups_x, groups_y, output[2], output[3])
    ctx.loss, ctx.row_offset = loss, row_offset


def _backward(ctx: Any, drows: Tensor | None, dcolumns: Tensor | None, *_saved: Tensor | None
              ) -> tuple[Tensor | None, ...]:
    x, y, log_scale, bias, groups_x, groups_y, row_lse, column_lse = ctx.saved_tensors
    drows = x.new_zeros(x.shape[0]) if drows is None else drows
    dcolumns = x.new_zeros(y.shape[0]) if dcolumns is None else dcolumns
    _, want_x, want_y, want_scale, want_bias, *_ = ctx.needs_input_grad
    dx, dy, dlog_scale, dbias = native_pair_loss_backward(
        ctx.loss, x, y, log_scale, bias, groups_x, groups_y, ctx.row_offset, row_lse, column_lse, drows, dcolumns,
        want_x, want_y)
    return (None, dx if want_x else None, dy if want_y else None, dlog_scale if want_scale else None,
            dbias if bias is not None and want_bias else None, None, None, None)


native_pair_loss.register_autograd(_backward, setup_context=_save)
