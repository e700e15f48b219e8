"""Token reduction in plain torch operators: the twins of the native kernels, and the path that export traces.

B batch, N tokens, K kept ones or slots, C width. Any floating type and device.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def falling(values: Tensor) -> Tensor:
    """Indices [..., N] of the values [..., N] by falling value, the lowest index first among equals; NaN counts as -inf.

    ONNX knows no stable sort, but its TopK, to which a sort is exported, puts the lowest index first.
    """
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if torch.compiler.is_exporting():
        return values.sort(dim=-1, descending=True).indices
    return values.sort(dim=-1, descending=True, stable=True).indices


def by_group(group: Tensor) -> Tensor:
    """Indices [B, N] of the integers group [B, N] by rising value, the lowest index first among equals."""
    length = group.shape[1]
    return (group * length + torch.arange(length, device=group.device)).sort(dim=1).indices


def match_reference(metric: Tensor, r: int, protect: int, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """metric [B, N, D] -> source, target [B, r], kept [B, N - r], assign [B, N], see `vlm.ops.bipartite_match`."""
    batch, length = metric.shape[0], metric.shape[1]
    sources, first = (length + 1) // 2, (protect + 1) // 2
    place = torch.arange(length, device=metric.device).expand(batch, -1)
    if r == 0 and order != "similarity":
        kept = place if order == "position" else torch.cat([place[:, ::2], place[:, 1::2]], 1)
        return place[:, :0], place[:, :0], kept, kept.sort(1).indices
    unit = F.normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    free, goals = unit[:, 2 * first::2], unit[:, 1::2][:, protect // 2:]
    cosine = (free @ goals.transpose(-1, -2)).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    best, partner = cosine.max(-1) if goals.shape[1] else (cosine.sum(-1), torch.zeros_like(cosine.sum(-1), dtype=torch.int64))
    by_cosine = falling(best)  # numbers of free sources
    chosen, rest = by_cosine[:, :r], by_cosine[:, r:]
    source = 2 * (chosen + first)
    target = 2 * (partner.gather(1, chosen) + protect // 2) + 1
    if order == "position":
        gone = torch.zeros_like(place).scatter(1, source, 1)
        kept = by_group(gone)[:, : length - r]
    else:
        rest = rest if order == "similarity" else rest.sort(1).values
        guarded = place[:, : 2 * first : 2]
        kept = torch.cat([guarded[:, :sources], 2 * (rest + first), place[:, 1::2]], 1)
    assign = torch.zeros_like(place).scatter(1, kept, torch.arange(length - r, device=metric.device).expand(batch, -1))
    return source, target, kept, assign.scatter(1, source, assign.gather(1, target))


def merge_weights_reference(assign: Tensor, sizes: Tensor, slots: int, by_size: bool) -> tuple[Tensor, Tensor]:
    """assign, sizes [B, N] -> weights [B, N] and the sizes of the slots [B, K]."""
    empty = sizes.new_zeros((assign.shape[0], slots))
    totals = empty.scatter_add(1, assign, sizes)
    members = empty.scatter_add(1, assign, torch.ones_like(sizes)).gather(1, assign)
    weights = members.reciprocal()
    if by_size:
        total = totals.gather(1, assign)
        weights = torch.where(total > 0, sizes / torch.where(total > 0, total, torch.ones_like(total)), weights)
    return weights, totals


def scatter_reference(x: Tensor, index: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    """The weighted sum of the rows of every slot: x [B, N, C], index [B, N] -> [B, slots, C]."""
    used = index >= 0
    if weights is not None:
        used = used & (weights != 0)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    x = torch.where(used[..., None], x, zero)
    if weights is not None:
        x = x * weights[..., None].to(x.dtype)
    at = index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2])
    return x.new_zeros((x.shape[0], slots, x.shape[2])).scatter_add(1, at, x)


def gather_reference(x: Tensor, index: Tensor) -> Tensor:
    """x [B, K, C], index [B, N] -> [B, N, C]; zeros where the index is -1."""
    if not torch.compiler.is_exporting() and x.shape[1] == 0:  # then every index is -1
        return x.new_zeros((x.shape[0], index.shape[1], x.shape[2]))
    rows = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
    return torch.where((index >= 0)[..., None], rows, torch.zeros((), dtype=x.dtype, device=x.device))


def select_reference(scores: Tensor, counts: Tensor, valid: Tensor | None, always: Tensor | None) -> tuple[Tensor, Tensor]:
    """scores [B, N], counts [B] -> index [B, N] ascending, then -1, and how many [B]."""
    length = scores.shape[1]
    everywhere = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    valid = everywhere if valid is None else valid
    always = ~everywhere if always is None else always
    judged = valid & ~always
    order = falling(scores)
    order = order.gather(1, by_group((~judged).long().gather(1, order)))
    place = torch.arange(length, device=scores.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, place)
    keep = (valid & always) | (judged & (rank < counts[:, None]))
    found = keep.sum(1)
    index = by_group((~keep).long())
    return torch.where(place < found[:, None], index, -1), found
