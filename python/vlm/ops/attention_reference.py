"""Exact attention in plain torch operators: the twin of the native kernel and the path that export traces.

B batch, H query heads, G key/value heads (H a multiple of G), N queries, M keys, D query/key width, V value width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.ops.attention_bias import AnyBias, narrowed, written_out
from vlm.ops.attention_random import kept_pairs
from vlm.ops.masks import MaskProgram, MaskShape


def default_scale(width: int) -> float:
    """1/sqrt(D); vectors of width 0 have products of 0 whatever they are multiplied by."""
    return width**-0.5 if width else 1.0


def allowed_pairs(
    queries: int, keys: int, *, causal: bool, alignment: str, key_mask: Tensor | None, device: torch.device
) -> Tensor | None:
    """Boolean mask, true where a query may attend: broadcastable to [B, 1, N, M], or None when every pair may."""
    allow: Tensor | None = None
    if causal:
        offset = keys - queries if alignment == "bottom-right" else 0
        i = torch.arange(queries, device=device)[:, None]
        j = torch.arange(keys, device=device)[None, :]
        allow = (j <= i + offset)[None, None]
    if key_mask is not None:
        valid = key_mask[:, None, None, :]
        allow = valid if allow is None else allow & valid
    return allow


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    alignment: str = "bottom-right",
    key_mask: Tensor | None = None,
    bias: AnyBias | None = None,
    scale: float | None = None,
    mask: MaskProgram | None = None,
    softcap: float = 0.0,
    dropout: tuple[float, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.attention` (arguments already checked), in any dtype and on any device.

    q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] -> [B, H, N, V], and lse [B, H, N] if asked for.
    """
    scale = default_scale(q.shape[-1]) if scale is None else scale
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    added = written_out(bias, shape)
    if mask is not None:
        padding = mask.key_mask(shape)
        if padding is not None:
            key_mask = padding if key_mask is None else key_mask & padding
    if key_mask is not None:  # removed keys may hold anything, NaN included: 0 * NaN must not reach a sum
        keep = key_mask[:, None, :, None]
        k = torch.where(keep, k, torch.zeros((), dtype=k.dtype, device=k.device))
        v = torch.where(keep, v, torch.zeros((), dtype=v.dtype, device=v.device))
    plain = mask is None and key_mask is None and added is None and not softcap and dropout is None
    if plain and not return_lse and q.numel() and k.shape[-2] and (
            not causal or alignment == "top-left" or q.shape[2] == k.shape[2]):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    allow = allowed_pairs(q.shape[2], k.shape[2], causal=causal, alignment=alignment, key_mask=key_mask,
                          device=q.device)
    atoms = None if mask is None else mask.allow(shape)
    if atoms is not None:
        allow = atoms if allow is None else allow & atoms
    if return_lse or softcap or dropout is not None or k.shape[-2] == 0 or q.numel() == 0:
        kept = None if dropout is None else (kept_pairs(dropout[0], dropout[1], *shape[:4], device=q.device), dropout[0])
        out, lse = _explicit(q, k, v, allow, added, scale, softcap, kept)
        return (out, lse) if return_lse else out
    return _sdpa(q, k, v, allow, added, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None, bias: Tensor | None, scale: float) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if bias is None and allow is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
    if bias is None:
        assert allow is not None
        alive = allow.any(-1, keepdim=True)
        mask = allow | ~alive  # an empty row attends everywhere, and is zeroed below, so that no NaN arises
    else:
        removed = torch.full((), -torch.inf, dtype=q.dtype, device=q.device)
        mask = narrowed(bias, q.dtype)
        mask = mask if allow is None else torch.where(allow, mask, removed)
        alive = (mask != -torch.inf).any(-1, keepdim=True)
        mask = torch.where(alive, mask, torch.zeros((), dtype=q.dtype, device=q.device))
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)
    return torch.where(alive, out, torch.zeros((), dtype=out.dtype, device=out.device))


def _explicit(q: Tensor, k: Tensor, v: Tensor, allow: Tensor | None, bias: Tensor | None, scale: float, softcap: float,
              kept: tuple[Tensor, float] | None) -> tuple[Tensor, Tensor]:
    repeat = q.shape[1] // k.shape[1] if k.shape[1] else 1
    if repeat != 1:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    work = torch.promote_types(q.dtype, torch.float32)
    logits = (q.to(work) @ k.to(work).transpose(-1, -2)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    removed = torch.full((), -torch.inf, dtype=work, device=q.device)
    if bias is not None:
        wide = narrowed(bias, work)
        logits = logits + (wide if allow is None else torch.where(allow, wide, torch.zeros_like(removed)))
    if allow is not None:
        logits = torch.where(allow, logits, removed)
    alive = (logits != -torch.inf).any(-1, keepdim=True)
    logits = torch.where(alive, logits, torch.zeros_like(removed))
    if k.shape[2]:
        lse = torch.logsumexp(logits, -1, keepdim=True)
    else:
        lse = torch.zeros_like(logits.sum(-1, keepdim=True))
    # Not exp(logits - lse): the sum of the exponentials is lost in the last bits of a large lse.
    weights = torch.where(alive, torch.softmax(logits, -1), torch.zeros_like(removed))
    if kept is not None:
        weights = torch.where(kept[0], weights / (1.0 - kept[1]), torch.zeros_like(removed))
    out = (weights @ v.to(work)).to(q.dtype)
    return out, torch.where(alive, lse, removed)[..., 0].to(torch.promote_types(q.dtype, torch.float32))
