"""The merge of attention results over disjoint keys in plain torch operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge_attention_reference(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.merge_attention`: parts of (out [B, H, N, V], lse [B, H, N]) -> one such pair."""
    lses = torch.stack([lse for _, lse in parts])
    filled = lses != -torch.inf
    alive = filled.any(0)
    # Empty parts and rows get a finite stand-in, so that no infinity meets another, and weight 0.
    safe = torch.where(filled | ~alive, torch.where(filled, lses, torch.zeros_like(lses)), torch.full_like(lses, -torch.inf))
    lse = torch.logsumexp(safe, 0)
    out: Tensor | None = None
    # Not exp(lse_p - lse): the sum is lost in the last bits of a large lse.
    for (part, _), share, there in zip(parts, torch.softmax(safe, 0), filled):
        weight = torch.where(there, share, torch.zeros_like(lse))
        content = torch.where(there[..., None], part, torch.zeros((), dtype=part.dtype, device=part.device))
        term = weight[..., None].to(lse.dtype) * content.to(lse.dtype)
        out = term if out is None else out + term
    assert out is not None
    return out.to(parts[0][0].dtype), torch.where(alive, lse, torch.full_like(lse, -torch.inf))
