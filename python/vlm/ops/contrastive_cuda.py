"""The contrastive losses on CUDA devices as torch operators. R rows, C columns, E width; all float32.

Operators of their own: where the native core gives the statistics of rows and columns, these kernels give the values of the
plain losses.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.cuda_core import workspace
from vlm.ops.kernels import Launch, launch_on, readable


def _problem(launch: Launch, loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None,
             groups_x: Tensor | None, groups_y: Tensor | None, row_offset: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to. Reads the scale from the device."""
    x, y = readable(x), readable(y)
    sizes = (x.shape[0], y.shape[0], x.shape[1])
    room = workspace(x, launch.module.pair_workspace(sizes))
    alive = [x, y, room]
    ids = [0, 0]
    if groups_x is not None and groups_y is not None:
        groups = [groups_x.to(torch.int64).contiguous(), groups_y.to(torch.int64).contiguous()]
        # An empty tensor has no address, yet its other side still has groups.
        groups = [g if g.numel() else g.new_zeros(1) for g in groups]
        ids = [g.data_ptr() for g in groups]
        alive += groups
    arguments: dict[str, Any] = {
        "loss": loss, "sizes": sizes, "x": (x.data_ptr(), x.stride(0)), "y": (y.data_ptr(), y.stride(0)),
        "scale": float(log_scale.exp()), "bias": 0.0 if bias is None else float(bias), "row_ids": ids[0],
        "column_ids": ids[1], "row_offset": row_offset, "workspace": room.data_ptr(), **launch.place,
    }
    return arguments, alive


def _outputs(loss: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = loss == "softmax"
    return (x.new_empty(x.shape[0]), x.new_empty(y.shape[0]), x.new_empty(x.shape[0] if saved else 0),
            x.new_empty(y.shape[0] if saved else 0))


def _gradient_outputs(x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, want_x: bool,
                      want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (x.new_empty(x.shape if want_x else (0,)), y.new_empty(y.shape if want_y else (0,)),
            x.new_empty(log_scale.shape), x.new_empty((0,) if bias is None else bias.shape))


@torch.library.custom_op("vlm::pair_loss_cuda", mutates_args=(), device_types=("cpu", "cuda"))
def pair_loss_cuda(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Optional[Tensor],  # noqa: UP045
                   groups_x: Optional[Tensor], groups_y: Optional[Tensor],  # noqa: UP045
                   row_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss "softmax" or "sigmoid", x [R, E], y [C, E] -> row values [R], column values [C], and for softmax the saved
    log-sum-exps [R] and [C] (empty for sigmoid), through which no gradient flows."""
    with launch_on(x) as launch:
        arguments, _alive = _problem(launch, loss, x, y, log_scale, bias, groups_x, groups_y, row_offset)
        outputs = _outputs(loss, x, y)
        rows, columns, row_lse, column_lse = (t.data_ptr() for t in outputs)
        launch.module.pair_forward(**arguments, row_values=rows, column_values=columns, row_lse=row_lse, column_lse=column_lse)
        return outputs


@torch.library.custom_op("vlm::pair_loss_cuda_backward", mutates_args=(), device_types=("cpu", "cuda"))
def pair_loss_cuda_backward(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Optional[Tensor],  # noqa: UP045
                            groups_x: Optional[Tensor], groups_y: Optional[Tensor],  # noqa: UP045
                            row_offset: int, row_lse: Tensor, column_lse: Tensor, drows: Tensor, dcolumns: Tensor,
                            want_x: bool, want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and y (empty unless wanted), log_scale and bias. Has no gradient of its own."""
    with launch_on(x) as launch:
        arguments, _alive = _problem(launch, loss, x, y, log_scale, bias, groups_x, groups_y, row_offset)
        drows, dcolumns = drows.contiguous(), dcolumns.contiguous()
        dx, dy, dlog_scale, dbias = _gradient_outputs(x, y, log_scale, bias, want_x, want_y)
        sums = x.new_empty(2, dtype=torch.float64)
        launch.module.pair_backward(
            **arguments, row_lse=row_lse.data_ptr(), column_lse=column_lse.data_ptr(), row_gradient=drows.data_ptr(),
            column_gradient=dcolumns.data_ptr(), dx=(dx.data_ptr(), x.shape[1]) if want_x else (0, 0),
            dy=(dy.data_ptr(), x.shape[1]) if want_y else (0, 0), sums=sums.data_ptr())
        dlog_scale.copy_(sums[0])
        if bias is not None:
            dbias.copy_(sums[1])
        return dx, dy, dlog_scale, dbias


@pair_loss_cuda.register_fake
def _(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
      groups_y: Tensor | None, row_offset: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(loss, x, y)


@pair_loss_cuda_backward.register_fake
def _(loss: str, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor | None, groups_x: Tensor | None,
      groups_y: Tensor | None, row_offset: int, row_lse: Tensor, column_lse: Tensor, drows: Tensor, dcolumns: Tensor,
      want_x: bool, want_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradient_outputs(x, y, log_scale, bias, want_x, want_y)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    loss, x, y, log_scale, bias, groups_x, groups_y, row_offset = inputs
    ctx.save_for_backward(x, y, log_scale, bias, groups_x, groups_y, output[2], output[3])
    ctx.loss, ctx.row_offset = loss, row_offset


def _gradients(ctx: Any, drows: Tensor | None, dcolumns: Tensor | None,
               *_saved: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, log_scale, bias, groups_x, groups_y, row_lse, column_lse = ctx.saved_tensors
    drows = x.new_zeros(x.shape[0]) if drows is None else drows
    dcolumns = x.new_zeros(y.shape[0]) if dcolumns is None else dcolumns
    _, want_x, want_y, want_scale, want_bias, *_ = ctx.needs_input_grad
    dx, dy, dlog_scale, dbias = pair_loss_cuda_backward(
        ctx.loss, x, y, log_scale, bias, groups_x, groups_y, ctx.row_offset, row_lse, column_lse, drows, dcolumns,
        want_x, want_y)
    return (None, dx if want_x else None, dy if want_y else None, dlog_scale if want_scale else None,
            dbias if bias is not None and want_bias else None, None, None, None)


pair_loss_cuda.register_autograd(_gradients, setup_context=_save)
