"""Exact attention over the native core, with its plain-torch twin.

B batch, H query heads, G key/value heads (H a multiple of G), N queries, M keys, D query/key width, V value width.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vlm.ops.attention_cuda import attention_cuda, attention_cuda_takes
from vlm.ops.attention_native import native_attention
from vlm.ops.attention_reference import attention_reference
from vlm.ops.backend import use_native

Alignment = Literal["bottom-right", "top-left"]


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., alignment: Alignment = ...,
              key_mask: Tensor | None = ..., bias: Tensor | None = ..., scale: float | None = ...,
              return_lse: Literal[False] = ...) -> Tensor: ...


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., alignment: Alignment = ...,
              key_mask: Tensor | None = ..., bias: Tensor | None = ..., scale: float | None = ...,
              return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    alignment: Alignment = "bottom-right",
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v over the allowed keys; differentiable once in q, k, v and bias.

    q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] -> [B, H, N, V]; with `return_lse` also the natural logarithm of
    the softmax denominator, [B, H, N] in float32 (float64 for float64 input), differentiable too.
    Query head h reads key/value head h // (H // G).

    causal: query i may attend key j if j <= i + offset; offset is M - N for alignment "bottom-right" (what decoding
        with a cache needs) and 0 for "top-left" (what torch's `is_causal` means).
    key_mask: bool [B, M], true where the key may be attended, or integer [B], the number of valid leading keys.
        Masked keys may hold anything, NaN included.
    bias: added to the scaled logits, broadcastable to [B, H, N, M]; -inf removes a pair.
    scale: 1/sqrt(D) by default.

    A query with no allowed key gets output 0, lse -inf, and gives no gradient. Half-precision input is computed in
    float32 by the native core and returned in its own type.
    Raises ValueError on shapes or dtypes that do not fit. Source: core-exact-attention.
    """
    q, k, v = _under_autocast(q, k, v)
    key_mask = _check(q, k, v, alignment, key_mask, bias)
    exporting = torch.compiler.is_exporting()  # then no length may be asked for: the answer would be fixed in the graph
    if causal and alignment == "bottom-right" and not exporting and q.shape[2] == 1:
        causal = False  # the last query sees every key
    plain = not exporting and key_mask is None and bias is None and not return_lse and (not causal or q.shape[2] == k.shape[2])
    if attention_cuda_takes(q, k, v, bias):
        offset = k.shape[2] - q.shape[2] if alignment == "bottom-right" else 0
        out, lse = attention_cuda(q, k, v, key_mask, bias, q.shape[3] ** -0.5 if scale is None else scale, causal, offset)
        return (out, lse) if return_lse else out
    if not use_native(q, k, v, bias, prefer_torch=plain and _torch_is_faster(q, k, v)):
        with torch.autocast(q.device.type, enabled=False):
            return attention_reference(q, k, v, causal=causal, alignment=alignment, key_mask=key_mask, bias=bias,
                                       scale=scale, return_lse=return_lse)
    if bias is not None:
        bias = bias.float()
        if bias.shape[3] != k.shape[2]:  # one number for all keys: the kernel wants a contiguous last axis
            bias = bias.expand(-1, -1, -1, k.shape[2]).contiguous()
    offset = k.shape[2] - q.shape[2] if alignment == "bottom-right" else 0
    out, lse = native_attention(q.float(), k.float(), v.float(), key_mask, bias,
                                q.shape[3] ** -0.5 if scale is None else scale, causal, offset)
    out = out.to(q.dtype)
    return (out, lse) if return_lse else out


def _torch_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Measured: below a few million products the call costs more than the work, and packing keys for fewer than 8
    queries is not repaid. Only asked where torch's own kernel needs no mask tensor."""
    products = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    return products < 4_000_000 or q.shape[2] < 8


def _under_autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does with torch's own attention: bring q, k, v to its type (float64 stays)."""
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return q, k, v
    narrow = torch.get_autocast_dtype(q.device.type)
    return q.to(narrow), k.to(narrow), v.to(narrow)


def _check(q: Tensor, k: Tensor, v: Tensor, alignment: str, key_mask: Tensor | None,
           bias: Tensor | None) -> Tensor | None:
    """Refuse what does not fit; returns the key mask as bool [B, M] or None."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"attention wants q, k, v of 4 axes [batch, heads, length, width], got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"attention: shapes do not fit: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
                         "expected q [B, H, N, D], k [B, G, M, D], v [B, G, M, V]")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"attention: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key/value heads")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"attention: q, k, v must share one floating type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if alignment not in ("bottom-right", "top-left"):
        raise ValueError(f"attention: alignment is {alignment!r}; expected 'bottom-right' or 'top-left'")
    if bias is not None:
        full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if not bias.is_floating_point():
            raise ValueError(f"attention: bias must be floating (use key_mask for booleans), got {bias.dtype}")
        if bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, full)):
            raise ValueError(f"attention: bias {tuple(bias.shape)} cannot be broadcast to {full}")
    if key_mask is None:
        return None
    if key_mask.ndim == 1 and key_mask.shape[0] == q.shape[0] and not key_mask.is_floating_point() \
            and key_mask.dtype != torch.bool:
        return torch.arange(k.shape[2], device=q.device)[None, :] < key_mask[:, None]
    if key_mask.dtype != torch.bool or key_mask.shape != (q.shape[0], k.shape[2]):
        raise ValueError(f"attention: key_mask must be bool [{q.shape[0]}, {k.shape[2]}] or integer lengths "
                         f"[{q.shape[0]}], got {key_mask.dtype} {tuple(key_mask.shape)}")
    return key_mask
