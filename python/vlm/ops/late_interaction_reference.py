"""Late interaction in plain torch: the twin of the tiled native kernel. It holds all token scores, [R, C, T, U].

R row samples of T tokens (pictures), C column samples of U tokens (texts), E width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def late_interaction_reference(
    v: Tensor, w: Tensor, *, mask_v: Tensor | None = None, mask_w: Tensor | None = None, mean: bool = True
) -> tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.late_interaction`: v [R, T, E], w [C, U, E] -> rows [R, C], columns [R, C]."""
    keep_v = torch.ones_like(v[..., 0], dtype=torch.bool) if mask_v is None else mask_v
    keep_w = torch.ones_like(w[..., 0], dtype=torch.bool) if mask_w is None else mask_w
    count_v, count_w = keep_v.sum(1)[:, None], keep_w.sum(1)[None, :]
    if v.shape[1] == 0 or w.shape[1] == 0:
        nothing = v.sum((1, 2))[:, None] * 0.0 + w.sum((1, 2))[None, :] * 0.0
        return nothing, nothing
    v = torch.where(keep_v[..., None], v, torch.zeros_like(v))  # a removed token may be NaN
    w = torch.where(keep_w[..., None], w, torch.zeros_like(w))
    scores = torch.einsum("iae,jbe->ijab", v, w)
    pairs = keep_v[:, None, :, None] & keep_w[None, :, None, :]
    scores = torch.where(pairs, scores, torch.full_like(scores, float("-inf")))
    both = (count_v > 0) & (count_w > 0)

    def reduce(best: Tensor, keep: Tensor, count: Tensor) -> Tensor:
        best = torch.where(keep & both[..., None], best, torch.zeros_like(best))
        total = best.sum(2)
        return total / count.clamp(min=1).to(total.dtype) if mean else total

    # max with indices: its gradient goes to one maximiser, the first, and is not shared out among equals.
    rows = reduce(scores.max(3).values, keep_v[:, None, :], count_v)
    columns = reduce(scores.max(2).values, keep_w[None, :, :], count_w)
    return rows, columns
