"""Mutual-guided similarity: tokens of either side weigh those of the other. Source: mug-stan.

R row samples of T tokens (frames, patches), C column samples of U tokens (words), E width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.ops.backend import one_device

_SCORE_BYTES = 32 * 2**20


def mutual_guided(v: Tensor, w: Tensor, *, mask_v: Tensor | None = None, mask_w: Tensor | None = None,
                  sharpness: float = 100.0) -> Tensor:
    """v [R, T, E], w [C, U, E], bool masks -> similarities [R, C].

    With s = <v_a, w_b> over tokens that count and k the sharpness: each w_b sees a_b = sum_a softmax_a(k s) s, together
    sum_b softmax_b(k a) a; the same with the roles exchanged; the similarity is the mean of the two. A pair of which one
    side has no token gets 0. Scores exist for some rows at a time, about 32 MiB of them, and are made again in the backward.
    Raises ValueError on shapes that do not fit.
    """
    if v.ndim != 3 or w.ndim != 3 or v.shape[2] != w.shape[2] or v.dtype != w.dtype:
        raise ValueError(f"mutual-guided similarity wants tokens [R, T, E] and [C, U, E] of one type, got {tuple(v.shape)} and "
                         f"{tuple(w.shape)}")
    one_device("mutual-guided similarity", v, w, mask_v, mask_w)
    for tokens, mask in ((v, mask_v), (w, mask_w)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:2]):
            raise ValueError(f"mutual-guided similarity: masks must be bool {list(tokens.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")
    wide = torch.promote_types(v.dtype, torch.float32)
    keep_v = torch.ones_like(v[..., 0], dtype=torch.bool) if mask_v is None else mask_v
    keep_w = torch.ones_like(w[..., 0], dtype=torch.bool) if mask_w is None else mask_w
    with torch.autocast(v.device.type, enabled=False):
        v = torch.where(keep_v[..., None], v, 0.0).to(wide)
        w = torch.where(keep_w[..., None], w, 0.0).to(wide)
        step = max(1, _SCORE_BYTES // max(1, 4 * v.shape[1] * w.shape[0] * w.shape[1]))
        parts = []
        for start in range(0, v.shape[0], step):
            own, keep = v[start : start + step], keep_v[start : start + step]
            if torch.is_grad_enabled() and (v.requires_grad or w.requires_grad):
                parts.append(checkpoint(_block, own, w, keep, keep_w, sharpness, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(_block(own, w, keep, keep_w, sharpness))
        return torch.cat(parts) if parts else v.new_zeros(0, w.shape[0])


def _block(v: Tensor, w: Tensor, keep_v: Tensor, keep_w: Tensor, sharpness: float) -> Tensor:
    s = torch.einsum("iae,jbe->ijab", v, w)
    over_v, over_w = keep_v[:, None, :, None], keep_w[None, :, None, :]
    by_w = _focus(_focus(s, over_v, sharpness, 2), keep_w[None, :, :], sharpness, 2)
    by_v = _focus(_focus(s, over_w, sharpness, 3), keep_v[:, None, :], sharpness, 2)
    return torch.where(keep_v.any(1)[:, None] & keep_w.any(1)[None, :], (by_w + by_v) / 2, 0.0)


def _focus(s: Tensor, keep: Tensor, sharpness: float, axis: int) -> Tensor:
    """sum of softmax(sharpness * s) s over what is kept; 0 where nothing is."""
    lowest = torch.where(keep.any(axis, keepdim=True), float("-inf"), 0.0).to(s)
    weights = torch.softmax(torch.where(keep, sharpness * s, lowest), axis)
    return (torch.where(keep, weights, 0.0) * s).sum(axis)
