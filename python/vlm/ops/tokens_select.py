"""Selection of tokens by score: ascending indices with a count for each sequence. B batch, N tokens, K at most kept.

Equal scores go to the lowest index, NaN counts as -inf. Nothing here has a gradient. Sources: core-select, fopru.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm.ops.backend import always, use_native
from vlm.ops.tokens_native import native_select
from vlm.ops.tokens_reference import by_group, falling, select_reference


class Selection(NamedTuple):
    """indices int64 [B, K], strictly rising, then -1; counts int64 [B]: how many of them are real."""

    indices: Tensor
    counts: Tensor


@torch.no_grad()
def select_top(scores: Tensor, k: int | Tensor, protect: int | Tensor = 0, *, valid: Tensor | None = None,
               size: int | None = None) -> Selection:
    """The k best of scores [B, N], and besides them every protected token.

    k: one number or int64 [B]; what exceeds the candidates keeps them all, 0 or less keeps none of them.
    protect: a number of leading tokens, or bool [B, N]; they stay whatever their score and are not counted in k.
    valid: bool [B, N]; false is never kept (padding), whatever it holds.
    size: K. By default the least that holds every row; with tensors in k, protect or valid that needs a look at the values,
        so give it (up to N) where the graph is compiled or exported.
    """
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(f"select_top wants floating scores [B, N], got {scores.dtype} {tuple(scores.shape)}")
    batch, length = scores.shape
    for name, mask in (("valid", valid), ("protect", protect if isinstance(protect, Tensor) else None)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != scores.shape):
            raise ValueError(f"select_top: {name} must be bool {tuple(scores.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if isinstance(k, Tensor) and (k.shape != (batch,) or k.is_floating_point() or k.dtype == torch.bool):
        raise ValueError(f"select_top: k must be a number or integers [{batch}], got {k.dtype} {tuple(k.shape)}")
    if size is None and not isinstance(k, Tensor) and not isinstance(protect, Tensor) and valid is None:
        leading = min(protect, length)
        size = leading + min(max(k, 0), length - leading)
    counts = k.long() if isinstance(k, Tensor) else torch.full((batch,), k, dtype=torch.int64, device=scores.device)
    kept = protect if isinstance(protect, Tensor) else None
    if kept is None and protect:
        kept = (torch.arange(length, device=scores.device) < protect).expand(batch, -1)
    if use_native(scores, cuda=always):
        index, count = native_select(scores.float(), counts, valid, kept)
    else:
        index, count = select_reference(scores, counts, valid, kept)
    if size is None:
        size = int(count.max()) if batch else 0
    return Selection(index[:, :size], count.clamp(max=size))


@torch.no_grad()
def select_threshold(scores: Tensor, threshold: float | Tensor, protect: int | Tensor = 0, *, valid: Tensor | None = None,
                     least: int = 0, most: int | None = None, size: int | None = None) -> Selection:
    """Every token whose score exceeds the threshold (a number, or [B, 1]), and besides them the protected ones.

    least, most: bounds on the number of tokens that are not protected; the best are kept, or the worst dropped.
    """
    judged = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    if isinstance(protect, Tensor):
        judged = judged & ~protect
    elif protect:
        judged = judged & (torch.arange(scores.shape[1], device=scores.device) >= protect)
    counts = (judged & (scores > threshold)).sum(1).clamp(min=least, max=most)
    return select_top(scores, counts, protect, valid=valid, size=size)


@torch.no_grad()
def select_rows(scores: Tensor, grid: tuple[int, int], k: int, *, last: Literal["drop", "cut"] = "drop") -> Selection:
    """Whole rows of the token grid by falling sum of their scores, until k tokens: scores [B, h * w], grid (h, w).

    last: the row that would exceed k is left out ("drop"), or gives its best tokens ("cut"). Source: fopru.
    """
    height, width = grid
    if scores.ndim != 2 or scores.shape[1] != height * width:
        raise ValueError(f"select_rows: scores {tuple(scores.shape)} are not [B, {height} * {width}]")
    if last not in ("drop", "cut"):
        raise ValueError(f"select_rows: last is {last!r}; expected 'drop' or 'cut'")
    k = min(max(k, 0), height * width)
    k = k if last == "cut" or not width else k // width * width
    clean = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    sums = clean.unflatten(1, grid).sum(-1)
    place = torch.arange(height, device=scores.device).expand_as(sums)
    rank = torch.zeros_like(place).scatter(1, falling(sums), place)
    order = falling(clean)
    order = order.gather(1, by_group(rank[..., None].expand(-1, -1, width).flatten(1).gather(1, order)))
    index = order[:, :k].sort(1).values
    return Selection(index, torch.full((scores.shape[0],), k, dtype=torch.int64, device=scores.device))
