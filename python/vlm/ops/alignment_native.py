"""Alignment of sequences by the native core as a torch operator. B pairs, costs [B, N, M], float32 on the CPU."""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core


def _problem(cost: Tensor, n: Tensor | None, m: Tensor | None, gamma: float) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    cost = cost if cost.stride(2) == 1 or cost.shape[2] <= 1 else cost.contiguous()
    n, m = (None if t is None else t.to(torch.int64).contiguous() for t in (n, m))
    batch, rows, columns = cost.shape
    arguments = {
        "batch": batch, "rows": rows, "columns": columns, "cost": (cost.data_ptr(), cost.stride(0), cost.stride(1)),
        "row_lengths": 0 if n is None else n.data_ptr(), "column_lengths": 0 if m is None else m.data_ptr(), "gamma": gamma,
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    return arguments, [cost, n, m]


@torch.library.custom_op("vlm::sequence_alignment", mutates_args=(), device_types="cpu")
def native_alignment(cost: Tensor, row_lengths: Optional[Tensor], column_lengths: Optional[Tensor], gamma: float) -> Tensor:  # noqa: UP045
    """cost [B, N, M], lengths [B] or None -> values [B]."""
    arguments, _alive = _problem(cost, row_lengths, column_lengths, gamma)
    values = cost.new_empty(cost.shape[0])
    core().alignment_forward(**arguments, values=values.data_ptr())
    return values


@native_alignment.register_fake
def _(cost: Tensor, row_lengths: Tensor | None, column_lengths: Tensor | None, gamma: float) -> Tensor:
    return cost.new_empty(cost.shape[0])


@torch.library.custom_op("vlm::sequence_alignment_backward", mutates_args=(), device_types="cpu")
def native_alignment_backward(
    cost: Tensor, row_lengths: Optional[Tensor], column_lengths: Optional[Tensor], gamma: float, upstream: Tensor  # noqa: UP045
) -> Tensor:
    """Gradient of the costs [B, N, M]. Has no gradient of its own."""
    arguments, _alive = _problem(cost, row_lengths, column_lengths, gamma)
    upstream = upstream.contiguous()
    gradient = cost.new_empty(tuple(cost.shape))
    core().alignment_backward(**arguments, upstream=upstream.data_ptr(), gradient=gradient.data_ptr())
    return gradient


@native_alignment_backward.register_fake
def _(cost: Tensor, row_lengths: Tensor | None, column_lengths: Tensor | None, gamma: float, upstream: Tensor) -> Tensor:
    return cost.new_empty(tuple(cost.shape))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cost, row_lengths, column_lengths, ctx.gamma = inputs
    ctx.save_for_backward(cost, row_lengths, column_lengths)


def _backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return native_alignment_backward(*ctx.saved_tensors, ctx.gamma, upstream), None, None, None


native_alignment.register_autograd(_backward, setup_context=_save)
