"""Merging attention results over disjoint sets of keys. B batch, H heads, N queries, V value width."""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import use_native
from vlm.ops.merge_native import native_merge
from vlm.ops.merge_reference import merge_attention_reference


def merge_attention(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over disjoint sets of them; differentiable once in every out and lse.

    parts: (out [B, H, N, V], lse [B, H, N]) as `attention(..., return_lse=True)` gives them -> one such pair:
    lse = log sum_p exp(lse_p), out = sum_p exp(lse_p - lse) out_p. Associative, so that a ring, a split over workers and
    retrieved blocks all merge with it. A part with lse -inf is empty: its out may hold anything and gets no gradient.
    Half-precision outs are merged in float32 and returned in their type; lse is float32 (float64 for float64 outs).
    Raises ValueError on shapes or dtypes that do not fit, and without parts. Source: core-exact-attention.
    """
    if not parts:
        raise ValueError("merge_attention wants at least one part (out, lse)")
    first = parts[0][0]
    wide = torch.promote_types(first.dtype, torch.float32)
    for out, lse in parts:
        if out.ndim != 4 or out.shape != first.shape or out.dtype != first.dtype or not out.is_floating_point():
            raise ValueError(f"merge_attention: outs must share one shape [B, H, N, V] and floating type, got {out.dtype} "
                             f"{tuple(out.shape)} beside {first.dtype} {tuple(first.shape)}")
        if lse.shape != out.shape[:3] or not lse.is_floating_point():
            raise ValueError(f"merge_attention: lse must be floating {tuple(out.shape[:3])}, got {lse.dtype} {tuple(lse.shape)}")
    lses = [lse.to(wide) for _, lse in parts]
    if use_native(*(out for out, _ in parts), *lses):
        out, lse = native_merge([out.float() for out, _ in parts], lses)
        return out.to(first.dtype), lse
    with torch.autocast(first.device.type, enabled=False):
        return merge_attention_reference([(out, lse) for (out, _), lse in zip(parts, lses)])
