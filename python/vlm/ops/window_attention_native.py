"""The native windowed attention as torch operators: shapes for the compiler, gradients, addresses for the core.

B maps, H rows, W columns, h heads, D head width. All float32 on the CPU.
"""

from typing import Any

import torch
from torch import Tensor

from vlm.ops.backend import core


def _readable(t: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _view(t: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of the first three of four axes."""
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _problem(qkv: Tensor, tau: Tensor, bias_table: Tensor, window: list[int], shift: list[int]) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    qkv, tau, bias_table = _readable(qkv), tau.contiguous(), bias_table.contiguous()
    heads = tau.shape[0]
    arguments: dict[str, Any] = {
        "sizes": (*qkv.shape[:3], heads, qkv.shape[3] // (3 * heads), *window, *shift),
        "qkv": _view(qkv), "tau": tau.data_ptr(), "bias_table": bias_table.data_ptr(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    return arguments, [qkv, tau, bias_table]


@torch.library.custom_op("vlm::window_attention", mutates_args=(), device_types="cpu")
def native_window_attention(
    qkv: Tensor, tau: Tensor, bias_table: Tensor, window: list[int], shift: list[int]
) -> tuple[Tensor, Tensor]:
    """qkv [B, H, W, 3 h D], tau [h], bias_table [(2 Wh - 1)(2 Ww - 1), h] -> out [B, H, W, h D], lse [B, h, H, W]."""
    arguments, _alive = _problem(qkv, tau, bias_table, window, shift)
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    lse = qkv.new_empty((qkv.shape[0], tau.shape[0], qkv.shape[1], qkv.shape[2]))
    core().window_attention_forward(**arguments, out=out.data_ptr(), lse=lse.data_ptr())
    return out, lse


@native_window_attention.register_fake
def _(qkv: Tensor, tau: Tensor, bias_table: Tensor, window: list[int], shift: list[int]) -> tuple[Tensor, Tensor]:
    out = qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
    return out, qkv.new_empty((qkv.shape[0], tau.shape[0], qkv.shape[1], qkv.shape[2]))


@torch.library.custom_op("vlm::window_attention_backward", mutates_args=(), device_types="cpu")
def native_window_attention_backward(
    qkv: Tensor, tau: Tensor, bias_table: Tensor, window: list[int], shift: list[int], out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv, tau and bias_table. Has no gradient of its own."""
    arguments, _alive = _problem(qkv, tau, bias_table, window, shift)
    out, lse, dout = out.contiguous(), lse.contiguous(), _readable(dout)
    dqkv, dtau, dtable = qkv.new_empty(qkv.shape), tau.new_empty(tau.shape), bias_table.new_empty(bias_table.shape)
    core().window_attention_backward(
        **arguments, out=out.data_ptr(), lse=lse.data_ptr(), dout=_view(dout), dqkv=dqkv.data_ptr(), dtau=dtau.data_ptr(),
        dbias_table=dtable.data_ptr(),
    )  # fmt: skip
    return dqkv, dtau, dtable


@native_window_attention_backward.register_fake
def _(
    qkv: Tensor, tau: Tensor, bias_table: Tensor, window: list[int], shift: list[int], out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), tau.new_empty(tau.shape), bias_table.new_empty(bias_table.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, tau, bias_table, window, shift = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(qkv, tau, bias_table, out, lse)
    ctx.options = (window, shift)


def _backward(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    qkv, tau, bias_table, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    return (*native_window_attention_backward(qkv, tau, bias_table, *ctx.options, out, lse, dout), None, None)


native_window_attention.register_autograd(_backward, setup_context=_save)
