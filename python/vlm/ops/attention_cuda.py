"""Exact attention on CUDA devices as torch operators: shapes for the compiler, gradients, addresses for the kernels.

B batch, H query heads, G key/value heads, N queries, M keys, D query/key width, V value width. Results lie as
[B, N, H, V] in memory and are returned as [B, H, N, V].
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.cuda_core import cuda_module, cuda_takes, launch_on, readable, workspace

_NO_VIEW = (0, 0, 0, 0)


def attention_cuda_takes(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> bool:
    """Whether the CUDA kernels compute attention of these tensors: widths up to 256, and room on the device."""
    if not cuda_takes(q, k, v, bias) or max(q.shape[3], v.shape[3]) > 256:
        return False
    core = cuda_module()
    return bool(core.attention_shared_bytes(_sizes(q, k, v)) <= core.device_shared_bytes(q.device.index or 0))


def attention_cuda(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float,
                   causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V], key_mask bool [B, M], bias [B|1, H|1, N|1, M|1]
    -> out [B, H, N, V] in q's type, lse [B, H, N] in float32.

    bf16 of widths up to 128 runs on tensor cores where no gradient is wanted; everything else is float32 inside.
    """
    if bias is not None:
        bias = bias.float().expand(-1, -1, -1, k.shape[2])
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias))
    if q.dtype == torch.bfloat16 and not wants_gradient and max(q.shape[3], v.shape[3]) <= 128:
        return forward_bf16(q, k, v, key_mask, bias, scale, causal, causal_offset)
    out, lse = forward(q.float(), k.float(), v.float(), key_mask, bias, scale, causal, causal_offset)
    return out.to(q.dtype), lse


def call_forward(core: Any, stream: int, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None,
                 scale: float, causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    """The float32 kernel of `core` on tensors of its device."""
    arguments, _alive = _problem(readable(q), readable(k), readable(v), key_mask, bias, scale, causal, causal_offset)
    out, lse = _outputs(q, v)
    core.attention_forward(**arguments, out=_view(out), lse=lse.data_ptr(), stream=stream)
    return out, lse


def call_forward_bf16(core: Any, stream: int, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None,
                      bias: Tensor | None, scale: float, causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    """The tensor core kernel of `core`; rows that do not start at multiples of 16 bytes are copied first."""
    q, k, v = (_in_pieces_of_16_bytes(t) for t in (q, k, v))
    arguments, _alive = _problem(q, k, v, key_mask, bias, scale, causal, causal_offset)
    out, lse = _outputs(q, v)
    core.attention_forward_bf16(**arguments, out=_view(out), lse=lse.data_ptr(), stream=stream)
    return out, lse


def call_backward(core: Any, stream: int, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None,
                  scale: float, causal: bool, causal_offset: int, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
                  want_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty unless wanted)."""
    arguments, _alive = _problem(readable(q), readable(k), readable(v), key_mask, bias, scale, causal, causal_offset)
    out, dout, lse, dlse = readable(out), readable(dout), lse.contiguous(), dlse.contiguous()
    dq, dk, dv = (_heads_inside(t, t.shape[3]) for t in (q, k, v))
    wanted = bias is not None and want_bias
    dbias = q.new_empty(bias.shape if wanted and bias is not None else (0,))
    room = workspace(q, 4 * lse.numel())
    core.attention_backward(
        **arguments, out=_view(out), lse=lse.data_ptr(), dout=_view(dout), dlse=dlse.data_ptr(), dq=_view(dq),
        dk=_view(dk), dv=_view(dv), dbias=dbias.data_ptr() if wanted else 0,
        bias_sizes=tuple(dbias.shape[:3]) if wanted else (1, 1, 1), workspace=room.data_ptr(), stream=stream,
    )
    return dq, dk, dv, dbias


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])


def _view(t: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of the first three of four axes."""
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _heads_inside(like: Tensor, width: int) -> Tensor:
    batch, heads, length = like.shape[:3]
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return _heads_inside(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _in_pieces_of_16_bytes(t: Tensor) -> Tensor:
    t = readable(t)
    if t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:3]):
        return t
    width = -(-t.shape[3] // 8) * 8
    room = t.new_empty((*t.shape[:3], width))[..., : t.shape[3]]
    room.copy_(t)
    return room


def _problem(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
             causal_offset: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by all kernels, and the tensors whose memory they point to."""
    alive = [q, k, v]
    arguments: dict[str, Any] = {
        "sizes": _sizes(q, k, v), "q": _view(q), "k": _view(k), "v": _view(v), "scale": scale, "causal": causal,
        "causal_offset": causal_offset, "key_mask": (0, 0), "bias": _NO_VIEW,
    }
    if key_mask is not None:
        key_mask = readable(key_mask)
        alive.append(key_mask)
        arguments["key_mask"] = (key_mask.data_ptr(), key_mask.stride(0))
    if bias is not None:
        bias = readable(bias).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        alive.append(bias)
        arguments["bias"] = _view(bias)
    return arguments, alive


@torch.library.custom_op("vlm::attention_cuda", mutates_args=(), device_types="cuda")
def forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
            scale: float, causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    """Float32 in and out: `call_forward` in the current stream."""
    with launch_on(q) as (core, stream):
        return call_forward(core, stream, q, k, v, key_mask, bias, scale, causal, causal_offset)


@torch.library.custom_op("vlm::attention_cuda_bf16", mutates_args=(), device_types="cuda")
def forward_bf16(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                 scale: float, causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    """bf16 in and out, without gradients: `call_forward_bf16` in the current stream."""
    with launch_on(q) as (core, stream):
        return call_forward_bf16(core, stream, q, k, v, key_mask, bias, scale, causal, causal_offset)


@torch.library.custom_op("vlm::attention_cuda_backward", mutates_args=(), device_types="cuda")
def backward(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
             scale: float, causal: bool, causal_offset: int, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
             want_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`call_backward` in the current stream. Has no gradient of its own."""
    with launch_on(q) as (core, stream):
        return call_backward(core, stream, q, k, v, key_mask, bias, scale, causal, causal_offset, out, lse, dout, dlse,
                             want_bias)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float,
                  causal: bool, causal_offset: int) -> tuple[Tensor, Tensor]:
    return _outputs(q, v)


forward.register_fake(_fake_forward)
forward_bf16.register_fake(_fake_forward)


@backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
      causal_offset: int, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor,
      want_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = (_heads_inside(t, t.shape[3]) for t in (q, k, v))
    return dq, dk, dv, q.new_empty(bias.shape if want_bias and bias is not None else (0,))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, bias, scale, causal, causal_offset = inputs
    ctx.save_for_backward(q, k, v, key_mask, bias, *output)
    ctx.options = (scale, causal, causal_offset)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, key_mask, bias, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    want_bias = bias is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dbias = backward(q, k, v, key_mask, bias, *ctx.options, out, lse, dout, dlse, want_bias)
    return dq, dk, dv, None, dbias if want_bias else None, None, None, None


forward.register_autograd(_gradients, setup_context=_save)
