"""The native selective scan as torch operators. B batch, N positions, C channels, S states; all float32 on the CPU."""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core

CHUNK = 64
"""Positions between two states that are kept for backward; the core's SSM_CHUNK, which a test compares."""


def _problem(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor | None,
             key_mask: Tensor | None, run: Tensor | None) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    rowed = [t if t.stride(2) == 1 or t.shape[2] <= 1 else t.contiguous() for t in (x, delta, b, c)]
    plain = [rate.contiguous(), skip.contiguous()]
    given = [None if t is None else t.contiguous() for t in (state, key_mask, None if run is None else run.to(torch.int32))]
    arguments = {
        "sizes": (*x.shape, rate.shape[1]),
        "x_delta_b_c": tuple((t.data_ptr(), t.stride(0), t.stride(1)) for t in rowed),
        "rate": plain[0].data_ptr(), "skip": plain[1].data_ptr(), "threads": torch.get_num_threads(),
    }
    arguments |= {name: 0 if t is None else t.data_ptr() for name, t in zip(("state", "keep", "run"), given)}
    return arguments, [*rowed, *plain, *(t for t in given if t is not None)]


def _results(x: Tensor, rate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = x.shape
    cell = (channels, rate.shape[1])
    return x.new_empty(x.shape), x.new_empty(batch, *cell), x.new_empty(batch, -(-length // CHUNK), *cell)


@torch.library.custom_op("vlm::ssm_scan", mutates_args=(), device_types="cpu")
def native_ssm_scan(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor,
                    state: Optional[Tensor], key_mask: Optional[Tensor],  # noqa: UP045
                    run: Optional[Tensor]) -> tuple[Tensor, Tensor, Tensor]:  # noqa: UP045
    """x, delta [B, N, C], rate [C, S], b, c [B, N, S], skip [C], state [B, C, S], key_mask bool [B, N], run int32 [B, N]
    -> out [B, N, C], last state [B, C, S], and the states before each chunk, through which no gradient flows."""
    arguments, _alive = _problem(x, delta, rate, b, c, skip, state, key_mask, run)
    out, last, borders = _results(x, rate)
    core().ssm_forward(**arguments, out=out.data_ptr(), final_state=last.data_ptr(), boundaries=borders.data_ptr())
    return out, last, borders


@native_ssm_scan.register_fake
def _(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor | None,
      key_mask: Tensor | None, run: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x, rate)


@torch.library.custom_op("vlm::ssm_scan_backward", mutates_args=(), device_types="cpu")
def native_ssm_scan_backward(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor,
                             state: Optional[Tensor], key_mask: Optional[Tensor], run: Optional[Tensor],  # noqa: UP045
                             borders: Tensor, dout: Tensor, dlast: Tensor) -> list[Tensor]:
    """Gradients of x, delta, rate, b, c, skip and state. Has no gradient of its own."""
    arguments, _alive = _problem(x, delta, rate, b, c, skip, state, key_mask, run)
    borders, dlast = borders.contiguous(), dlast.contiguous()
    dout = dout if dout.stride(2) == 1 or dout.shape[2] <= 1 else dout.contiguous()
    gradients = [t.new_empty(t.shape) for t in (x, delta, rate, b, c, skip, dlast)]
    core().ssm_backward(**arguments, boundaries=borders.data_ptr(), dout=(dout.data_ptr(), dout.stride(0), dout.stride(1)),
                        dfinal=dlast.data_ptr(), gradients=tuple(t.data_ptr() for t in gradients))
    return gradients


@native_ssm_scan_backward.register_fake
def _(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor | None,
      key_mask: Tensor | None, run: Tensor | None, borders: Tensor, dout: Tensor, dlast: Tensor) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in (x, delta, rate, b, c, skip, dlast)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[2])


def _backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _borders: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, borders = ctx.saved_tensors
    x, rate = inputs[0], inputs[2]
    dout = torch.zeros_like(x) if dout is None else dout
    dlast = x.new_zeros(x.shape[0], *rate.shape) if dlast is None else dlast
    gradients = native_ssm_scan_backward(*inputs, borders, dout, dlast)
    wanted = ctx.needs_input_grad
    return (*(g if wanted[i] else None for i, g in enumerate(gradients)), None, None)


native_ssm_scan.register_autograd(_backward, setup_context=_save)
