"""Windowed cosine attention over a whole feature map, native or in plain torch.

B maps, H rows, W columns, h heads, D head width, Wh x Ww a window. Source: swin-v2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import under_autocast, use_native
from vlm.ops.window_attention_native import native_window_attention
from vlm.ops.window_attention_reference import Pair, window_attention_reference


def window_attention(
    qkv: Tensor, tau: Tensor, bias_table: Tensor, *, window: int | Pair, shift: int | Pair = 0
) -> Tensor:
    """softmax(tau_h cos(q_i, k_j) + bias_h(i - j)) v inside each window of a map; differentiable once in all three.

    qkv [B, H, W, 3 h D], channels ordered (q, k, v), then head, then width; tau [h]; bias_table
    [(2 Wh - 1)(2 Ww - 1), h], row (dy + Wh - 1)(2 Ww - 1) + dx + Ww - 1 for the offset (dy, dx) query minus key.
    -> [B, H, W, h D].

    The map is covered from its upper left corner by windows; what they reach beyond it does not exist: it is never
    attended and has no output. With a shift (0 <= shift < window) the covered area is rolled up and left by it first,
    and positions that the roll brought together from two sides of the area do not see one another.
    cos is the product of vectors divided by their length or 1e-12, whichever is greater. tau is what the caller made
    of its parameter: a clamp outside also stops the gradient.

    Half-precision input is computed in float32 and returned in its own type. Raises ValueError on shapes that do not fit.
    """
    window, shift = _pair(window), _pair(shift)
    (qkv,) = under_autocast(qkv)
    _check(qkv, tau, bias_table, window, shift)
    if not use_native(qkv, tau, bias_table):
        with torch.autocast(qkv.device.type, enabled=False):
            wide = torch.promote_types(qkv.dtype, torch.float32)
            return window_attention_reference(qkv.to(wide), tau.to(wide), bias_table.to(wide), window=window, shift=shift).to(qkv.dtype)
    return native_window_attention(qkv.float(), tau.float(), bias_table.float(), list(window), list(shift))[0].to(qkv.dtype)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _check(qkv: Tensor, tau: Tensor, bias_table: Tensor, window: Pair, shift: Pair) -> None:
    if qkv.ndim != 4 or tau.ndim != 1 or bias_table.ndim != 2:
        raise ValueError(
            f"window_attention wants qkv [B, H, W, 3 h D], tau [h] and bias_table [offsets, h], got {tuple(qkv.shape)}, "
            f"{tuple(tau.shape)}, {tuple(bias_table.shape)}"
        )
    heads = tau.shape[0]
    if heads == 0 or qkv.shape[3] % (3 * heads):
        raise ValueError(f"window_attention: {qkv.shape[3]} channels are no multiple of 3 x {heads} heads")
    if min(window) < 1 or not all(0 <= s < w for s, w in zip(shift, window)):
        raise ValueError(f"window_attention: window {window} and shift {shift}; expected 0 <= shift < window")
    offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
    if bias_table.shape != (offsets, heads):
        raise ValueError(f"window_attention: bias_table {tuple(bias_table.shape)}, expected {(offsets, heads)} for window {window}")
    if not (qkv.is_floating_point() and tau.is_floating_point() and bias_table.is_floating_point()):
        raise ValueError(f"window_attention: floating tensors are wanted, got {qkv.dtype}, {tau.dtype}, {bias_table.dtype}")
