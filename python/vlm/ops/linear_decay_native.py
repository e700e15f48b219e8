"""The native linear attention as torch operators: shapes for the compiler, gradients, addresses for the kernels.

B batch, H heads, N positions, D query/key width, E value width. All float32. The kernels of a GPU take chunks of 64 positions
whatever is asked for, widths up to 128, and neither `key_mask` nor `run`.
Results are laid out as [B, N, H, E] in memory and returned as [B, H, N, E], so that merging the heads is free.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.cuda_core import block_fits
from vlm.ops.kernels import address, launch_on, readable, view

BACKWARD_CHUNK = 64
SPAN = 2
"""The gradient of the decay is put together from spans of so many chunks; each keeps two states."""


def cuda_decays(q: Tensor, v: Tensor, key_mask: Tensor | None, run: Tensor | None) -> bool:
    """Whether the CUDA kernels compute this call, and its gradients, in which widths change their places."""
    width = max(q.shape[3], v.shape[3])
    return key_mask is None and run is None and width <= 128 and block_fits("linear_scan_shared_bytes", width, q.device.index or 0)


def _spans(length: int, chunk: int, every: int) -> int:
    return 0 if every == 0 else -(-length // (chunk * every))


def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, key_mask: Tensor | None,
          run: Tensor | None, chunk: int, every: int, reverse: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """(out [B, H, N, E], last state [B, H, D, E], states at the span borders [B, H, spans, D, E])."""
    q, k, v, log_decay = readable(q), readable(k), readable(v), log_decay.contiguous()
    state = None if state is None else state.contiguous()
    key_mask = None if key_mask is None else key_mask.contiguous()
    run = None if run is None else run.to(torch.int32).contiguous()
    with launch_on(q) as launch:
        chunk = BACKWARD_CHUNK if launch.cuda else chunk
        out, last, borders = _results(q, v, chunk, every)
        launch.module.linear_scan(
            sizes=(*q.shape, v.shape[3]), q=view(q), k=view(k), v=view(v), log_decay=log_decay.data_ptr(), state=address(state),
            keep=address(key_mask), run=address(run), reverse=reverse, chunk=chunk, out=view(out), final_state=last.data_ptr(),
            boundaries=borders.data_ptr() if every else 0, boundary_every=every, **launch.place,
        )
    return out, last, borders


def _results(q: Tensor, v: Tensor, chunk: int, every: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, length, width = q.shape
    out = q.new_empty((batch, length, heads, v.shape[3])).transpose(1, 2)
    borders = q.new_empty((batch, heads, _spans(length, chunk, every), width, v.shape[3]))
    return out, q.new_empty((batch, heads, width, v.shape[3])), borders


@torch.library.custom_op("vlm::linear_decay", mutates_args=(), device_types=("cpu", "cuda"))
def native_linear_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Optional[Tensor],  # noqa: UP045
                        key_mask: Optional[Tensor], run: Optional[Tensor],  # noqa: UP045
                        chunk: int, every: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k [B, H, N, D], v [B, H, N, E], log_decay [H], state [B, H, D, E], key_mask bool [B, N], run int32 [B, N]
    -> out [B, H, N, E], last state [B, H, D, E], and the states before every `every` chunks (none for 0), through which no
    gradient flows."""
    return _scan(q, k, v, log_decay, state, key_mask, run, chunk, every)


@native_linear_decay.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, key_mask: Tensor | None, run: Tensor | None,
      chunk: int, every: int) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q, v, chunk, every)


@torch.library.custom_op("vlm::linear_decay_backward", mutates_args=(), device_types=("cpu", "cuda"))
def native_linear_decay_backward(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Optional[Tensor],  # noqa: UP045
                                 key_mask: Optional[Tensor], run: Optional[Tensor],  # noqa: UP045
                                 last: Tensor, dout: Tensor, dlast: Tensor,
                                 want_decay: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay (empty unless wanted) and state. Has no gradient of its own.

    Every one is a scan with exchanged roles; see vlm/recurrent.hpp.
    """
    every = SPAN if want_decay else 0
    shared = (key_mask, run, BACKWARD_CHUNK, every)
    dq, _, states = _scan(dout, v, k, log_decay, None if state is None else state.mT, *shared)
    dk, _, _ = _scan(v, dout, q, log_decay, dlast.mT, key_mask, run, BACKWARD_CHUNK, 0, reverse=True)
    dv, dstate, arriving = _scan(k, q, dout, log_decay, dlast, *shared, reverse=True)
    if not want_decay:
        return dq, dk, dv, q.new_empty(0), dstate
    flow = torch.cat([_dot(states.mT, arriving).sum(-1), _dot(last, dlast).sum(-1)[..., None]], 2)
    return dq, dk, dv, _decay_gradient(_dot(q, dq), _dot(k, dk), flow, key_mask), dstate


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last axis, in double."""
    return (a * b).double().sum(-1)


def _decay_gradient(by_query: Tensor, by_key: Tensor, flow: Tensor, key_mask: Tensor | None) -> Tensor:
    """d loss / d log_decay, float32 [H]. by_query, by_key [B, H, N]: <q_i, dq_i> and <k_i, dk_i>; flow [B, H, spans + 1]:
    <state, its gradient> at the borders of the spans.

    In a span of n positions, with u counting from 0, every pair contributes its distance: the sum of u <q, dq> - u <k, dk>,
    with the state that comes in at place -1 and the one that goes out at place n - 1. Spans are short, so that large
    places do not cancel.
    """
    length, span = by_query.shape[2], BACKWARD_CHUNK * SPAN
    if key_mask is not None:
        gone = ~key_mask[:, None]
        by_query, by_key = by_query.masked_fill(gone, 0.0), by_key.masked_fill(gone, 0.0)
    spans = flow.shape[2] - 1
    exists = by_query.new_ones(by_query.shape[0], length) if key_mask is None else key_mask.double()
    pad = spans * span - length
    exists, net = (torch.nn.functional.pad(t, (0, pad)).unflatten(-1, (spans, span)) for t in (exists, by_query - by_key))
    count = exists.cumsum(-1)
    inside = (net * (count - 1)[:, None]).sum((0, 2, 3)) if length else net.new_zeros(by_query.shape[1])
    ends = (flow[:, :, 1:] * (count[..., -1] - 1)[:, None] + flow[:, :, :-1]).sum((0, 2)) if length else 0.0
    return (inside + ends).float()


@native_linear_decay_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, key_mask: Tensor | None, run: Tensor | None,
      last: Tensor, dout: Tensor, dlast: Tensor, want_decay: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (t.new_empty((t.shape[0], t.shape[2], t.shape[1], t.shape[3])).transpose(1, 2) for t in (q, k, v))
    return dq, dk, dv, q.new_empty(log_decay.shape if want_decay else (0,)), torch.empty_like(last)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    q, k, v, log_decay, state, key_mask, run, _, _ = inputs
    ctx.save_for_backward(q, k, v, log_decay, state, key_mask, run, output[1])


def _backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None, _borders: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, log_decay, state, key_mask, run, last = ctx.saved_tensors
    dout = torch.zeros_like(v) if dout is None else dout
    dlast = torch.zeros_like(last) if dlast is None else dlast
    want_decay = ctx.needs_input_grad[3]
    dq, dk, dv, ddecay, dstate = native_linear_decay_backward(q, k, v, log_decay, state, key_mask, run, last, dout, dlast,
                                                              want_decay)
    wants_state = state is not None and ctx.needs_input_grad[4]
    return dq, dk, dv, ddecay if want_decay else None, dstate if wants_state else None, None, None, None, None


native_linear_decay.register_autograd(_backward, setup_context=_save)
