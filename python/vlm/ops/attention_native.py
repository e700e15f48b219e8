"""The native exact attention as torch operators: shapes for the compiler, gradients, addresses for the core.

B batch, H query heads, G key/value heads, N queries, M keys, D query/key width, V value width. All float32 on the CPU.
Results are laid out as [B, N, H, V] in memory and returned as [B, H, N, V], so that merging the heads is free.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core

_NO_VIEW = (0, 0, 0, 0)


def _readable(t: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _view(t: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of the first three of four axes."""
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _heads_inside(like: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float,
             causal: bool, causal_offset: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    q, k, v = _readable(q), _readable(k), _readable(v)
    alive = [q, k, v]
    arguments: dict[str, Any] = {
        "sizes": (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        "q": _view(q), "k": _view(k), "v": _view(v), "scale": scale, "causal": causal,
        "causal_offset": causal_offset, "key_mask": 0, "key_mask_stride": 0, "bias": _NO_VIEW,
        "threads": torch.get_num_threads(),
    }
    if key_mask is not None:
        key_mask = _readable(key_mask)
        alive.append(key_mask)
        arguments |= {"key_mask": key_mask.data_ptr(), "key_mask_stride": key_mask.stride(0)}
    if bias is not None:
        bias = _readable(bias).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        alive.append(bias)
        arguments["bias"] = _view(bias)
    return arguments, alive


@torch.library.custom_op("vlm::attention", mutates_args=(), device_types="cpu")
def native_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                     scale: float, causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V], key_mask bool [B, M], bias [B|1, H|1, N|1, M]
    -> out [B, H, N, V], lse [B, H, N]."""
    arguments, _alive = _problem(q, k, v, key_mask, bias, scale, causal, causal_offset)
    out = _heads_inside(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    lse = q.new_empty(q.shape[:3])
    core().attention_forward(**arguments, out=_view(out), lse=lse.data_ptr())
    return out, lse


@native_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
      causal_offset: int) -> tuple[Tensor, Tensor]:
    return _heads_inside(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3]), q.new_empty(q.shape[:3])


@torch.library.custom_op("vlm::attention_backward", mutates_args=(), device_types="cpu")
def native_attention_backward(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor],  # noqa: UP045
                              bias: Optional[Tensor], scale: float, causal: bool, causal_offset: int,  # noqa: UP045
                              out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
                              want_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty unless wanted). Has no gradient of its own."""
    arguments, _alive = _problem(q, k, v, key_mask, bias, scale, causal, causal_offset)
    out, dout, lse, dlse = _readable(out), _readable(dout), lse.contiguous(), dlse.contiguous()
    dq = _heads_inside(q, q.shape[0], q.shape[1], q.shape[2], q.shape[3])
    dk = _heads_inside(k, k.shape[0], k.shape[1], k.shape[2], k.shape[3])
    dv = _heads_inside(v, v.shape[0], v.shape[1], v.shape[2], v.shape[3])
    dbias = q.new_empty(bias.shape if want_bias and bias is not None else (0,))
    wanted = want_bias and bias is not None
    core().attention_backward(
        **arguments, out=_view(out), lse=lse.data_ptr(), dout=_view(dout), dlse=dlse.data_ptr(), dq=_view(dq),
        dk=_view(dk), dv=_view(dv), dbias=dbias.data_ptr() if wanted else 0,
        bias_sizes=tuple(dbias.shape[:3]) if wanted else (1, 1, 1),
    )
    return dq, dk, dv, dbias


@native_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
      causal_offset: int, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
      want_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grads = [_heads_inside(t, t.shape[0], t.shape[1], t.shape[2], t.shape[3]) for t in (q, k, v)]
    return grads[0], grads[1], grads[2], q.new_empty(bias.shape if want_bias and bias is not None else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, bias, scale, causal, causal_offset = inputs
    ctx.save_for_backward(q, k, v, key_mask, bias, *output)
    ctx.options = (scale, causal, causal_offset)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, bias, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    want_bias = bias is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dbias = native_attention_backward(q, k, v, key_mask, bias, *ctx.options, out, lse, dout, dlse,
                                                  want_bias)
    return dq, dk, dv, None, dbias if want_bias else None, None, None, None


native_attention.register_autograd(_backward, setup_context=_save)
