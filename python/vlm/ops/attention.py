"""Exact attention over the native core, with its plain-torch twin.

B batch, H query heads, G key/value heads (H a multiple of G), N queries, M keys, D query/key width, V value width.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm.ops.attention_bias import AnyBias, lowered, narrowed
from vlm.ops.attention_native import cuda_attends, native_attention
from vlm.ops.attention_reference import attention_reference, default_scale
from vlm.ops.backend import one_device, under_autocast, use_native
from vlm.ops.cuda_core import cuda_kernels_of
from vlm.ops.masks import Alignment, Atom, MaskProgram, MaskShape, key_mask_of

Score = Literal["dot", "cosine"]


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., alignment: Alignment = ...,
              key_mask: Tensor | None = ..., bias: AnyBias | None = ..., scale: float | None = ...,
              mask: MaskProgram | Atom | None = ..., softcap: float | None = ..., score: Score = ...,
              temperature: Tensor | None = ..., max_temperature: float = ..., dropout: tuple[float, int] | None = ...,
              return_lse: Literal[False] = ...) -> Tensor: ...


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = ..., alignment: Alignment = ...,
              key_mask: Tensor | None = ..., bias: AnyBias | None = ..., scale: float | None = ...,
              mask: MaskProgram | Atom | None = ..., softcap: float | None = ..., score: Score = ...,
              temperature: Tensor | None = ..., max_temperature: float = ..., dropout: tuple[float, int] | None = ...,
              return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    alignment: Alignment = "bottom-right",
    key_mask: Tensor | None = None,
    bias: AnyBias | None = None,
    scale: float | None = None,
    mask: MaskProgram | Atom | None = None,
    softcap: float | None = None,
    score: Score = "dot",
    temperature: Tensor | None = None,
    max_temperature: float = 100.0,
    dropout: tuple[float, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(score(q, k) + bias) v over the allowed keys; differentiable once in q, k, v, bias and temperature.

    q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] -> [B, H, N, V]; with `return_lse` also the natural logarithm of
    the softmax denominator, [B, H, N] in float32 (float64 for float64 input), differentiable too.
    Query head h reads key/value head h // (H // G).

    causal: query i may attend key j if j <= i + offset; offset is M - N for alignment "bottom-right" (what decoding
        with a cache needs) and 0 for "top-left" (what torch's `is_causal` means).
    key_mask: bool [B, M], true where the key may be attended, or integer [B], the number of valid leading keys.
        Masked keys may hold anything, NaN included.
    mask: atoms of `vlm.ops.masks` that must hold beside `causal` and `key_mask`; tiles that they empty cost nothing.
    bias: added to the scaled logits: a tensor broadcastable to [B, H, N, M], where -inf removes a pair, or a bias by
        position of `vlm.ops.attention_bias`, which needs no such tensor. A finite bias, however low, removes nothing: a
        query whose keys all have `torch.finfo(dtype).min` averages over them. Use `key_mask` or -inf for an empty row.
        The native core takes what is below -2.36e38 for that number, and then gives it for lse.
    scale: 1/sqrt(D) by default (1 for the cosine, and where D is 0).
    softcap: logits become softcap * tanh(logits / softcap), before the bias; must be positive.
    score: "dot" is scale * <q, k>; "cosine" is temperature_h * cos(q, k) with a positive `temperature` [H] or [1],
        clamped to `max_temperature` (no gradient beyond it).
    dropout: (p, seed): a probability is dropped where a hash of (seed, b, h, i, j) says so, and the others are divided
        by 1 - p; the same pairs on every backend and at every thread count. lse is that of the undropped softmax.

    A query with no allowed key gets output 0, lse -inf, and gives no gradient. Half-precision input is returned in its
    own type; the native core multiplies bfloat16 as it is where the processor does that, and computes in float32 elsewhere.
    On a GPU without the compiled kernels, and for what they do not take (docs/kernels/cuda.md), plain torch computes.
    Raises ValueError on shapes or dtypes that do not fit. Source: core-exact-attention, swin-v2 for the cosine.
    """
    one_device("attention", q, k, v, key_mask, bias if isinstance(bias, Tensor) else None, temperature)
    q, k, v = under_autocast(q, k, v)
    key_mask = _check(q, k, v, alignment, key_mask, bias)
    softcap, dropout = _options(softcap, score, temperature, dropout)
    if temperature is not None:
        temperature = _clamped(temperature, q.shape[1], max_temperature)
        scale = 1.0 if scale is None else scale
    if isinstance(mask, Atom):
        mask = MaskProgram(mask)
    exporting = torch.compiler.is_exporting()  # then no length may be asked for: the answer would be fixed in the graph
    if causal and alignment == "bottom-right" and not exporting and q.shape[2] == 1:
        causal = False  # the last query sees every key
    plain = not exporting and key_mask is None and bias is None and mask is None and temperature is None and not softcap \
        and dropout is None and not return_lse and (not causal or q.shape[2] == k.shape[2])
    given = bias if isinstance(bias, Tensor) else None
    def cuda() -> bool:
        extras = temperature is not None or bool(softcap) or dropout is not None
        return cuda_attends(q, v.shape[3], 0 if mask is None else len(mask.atoms), extras)

    if not use_native(q, k, v, given, temperature, prefer_torch=plain and _torch_is_faster(q, k, v), cuda=cuda):
        with torch.autocast(q.device.type, enabled=False):
            if temperature is not None:
                q, k = F.normalize(q, dim=-1) * temperature.to(q.dtype)[:, None, None], F.normalize(k, dim=-1)
            return attention_reference(q, k, v, causal=causal, alignment=alignment, key_mask=key_mask, bias=bias,
                                       scale=scale, mask=mask, softcap=softcap, dropout=dropout, return_lse=return_lse)
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    pairs, relative = lowered(bias, shape, grids=cuda_kernels_of(q) is None)
    if pairs is not None:
        pairs = narrowed(pairs, torch.float32)
        if pairs.shape[3] != k.shape[2]:  # one number for all keys: the kernel wants a contiguous last axis
            pairs = pairs.expand(-1, -1, -1, k.shape[2]).contiguous()
    more: dict[str, object] = {}
    if mask is not None:
        padding = mask.key_mask(shape)
        if padding is not None:
            key_mask = padding if key_mask is None else key_mask & padding
        more["mask"] = lower = mask.lower(shape)
        one_device("attention: mask", q, lower.arrays, lower.dense, padding)
    if relative is not None:
        more |= {"relative": narrowed(relative.values, torch.float32), "grid": relative.grid}
    if temperature is not None:
        more["temperature"] = temperature.float()
    if softcap:
        more["softcap"] = softcap
    if dropout is not None:
        more |= {"dropout": dropout[0], "seed": dropout[1]}
    offset = k.shape[2] - q.shape[2] if alignment == "bottom-right" else 0
    dtype = q.dtype
    if dtype != torch.bfloat16:  # bfloat16 is the operator's business
        q, k, v = q.float(), k.float(), v.float()
    out, lse = native_attention(q, k, v, key_mask, pairs, default_scale(q.shape[3]) if scale is None else scale, causal,
                                offset, **more)  # type: ignore[arg-type]
    out = out.to(dtype)
    return (out, lse) if return_lse else out


def _clamped(temperature: Tensor, heads: int, limit: float) -> Tensor:
    if temperature.ndim != 1 or temperature.shape[0] not in (1, heads):
        raise ValueError(f"attention: temperature must be [{heads}] or [1], got {tuple(temperature.shape)}")
    return temperature.clamp(max=limit)


def _options(softcap: float | None, score: str, temperature: Tensor | None,
             dropout: tuple[float, int] | None) -> tuple[float, tuple[float, int] | None]:
    """Soft cap (0 = none) and dropout (None where nothing is dropped); refuses what is out of range."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention: softcap is {softcap}; expected a positive number or None")
    if score not in ("dot", "cosine"):
        raise ValueError(f"attention: score is {score!r}; expected 'dot' or 'cosine'")
    if (score == "cosine") != (temperature is not None):
        raise ValueError("attention: score 'cosine' goes with a temperature, and 'dot' without")
    if dropout is not None and not 0 <= dropout[0] < 1:
        raise ValueError(f"attention: dropout probability is {dropout[0]}; expected 0 <= p < 1")
    return softcap or 0.0, None if dropout is None or dropout[0] == 0 else (dropout[0], dropout[1] & (2**63 - 1))


def _torch_is_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Measured: below a few million products the call costs more than the work, and packing keys for fewer than 8
    queries is not repaid. Only asked where torch's own kernel needs no mask tensor."""
    products = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * (q.shape[3] + v.shape[3])
    return products < 4_000_000 or q.shape[2] < 8


def _check(q: Tensor, k: Tensor, v: Tensor, alignment: str, key_mask: Tensor | None,
           bias: AnyBias | None) -> Tensor | None:
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
    if isinstance(bias, Tensor):
        full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if not bias.is_floating_point():
            raise ValueError(f"attention: bias must be floating (use key_mask for booleans), got {bias.dtype}")
        if bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, full)):
            raise ValueError(f"attention: bias {tuple(bias.shape)} cannot be broadcast to {full}")
    if key_mask is None:
        return None
    return key_mask_of(key_mask, MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device))
