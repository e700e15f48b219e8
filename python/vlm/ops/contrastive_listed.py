"""Targets given one by one: several positives of a row, or the few likely ones of a teacher. R rows, C columns, K a row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def listed_targets(x: Tensor, y: Tensor, log_scale: Tensor, index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, E], y [C, E], index [R, K] into y (-1: none), weight [R, K] without gradient -> (sum of weight * logit,
    sum of weight), each [R]. No tensor of [R, K, E] exists; the gradient of y is added up in the order of the rows."""
    weight = torch.where(index >= 0, weight.to(x.dtype), torch.zeros((), dtype=x.dtype, device=x.device))
    total: Tensor = _Listed.apply(x, y, log_scale, index.clamp(min=0), weight)
    return total, weight.sum(1)


def check_listed(name: str, index: Tensor, weight: Tensor, rows: int, columns: int) -> None:
    """ValueError where the lists do not fit."""
    if index.ndim != 2 or index.shape[0] != rows or index.is_floating_point() or weight.shape != index.shape:
        raise ValueError(f"contrastive loss: {name} must be integer indices [{rows}, K] and weights of the same shape, got "
                         f"{index.dtype} {tuple(index.shape)} and {tuple(weight.shape)}")
    if index.numel() and (int(index.max()) >= columns or int(index.min()) < -1):
        raise ValueError(f"contrastive loss: {name} has indices outside of -1..{columns - 1}")
    if weight.requires_grad:
        raise ValueError(f"contrastive loss: the weights of {name} must carry no gradient")


@torch.no_grad()
def likeliest(x: Tensor, y: Tensor, count: int, chunk: int = 2**22) -> tuple[Tensor, Tensor]:
    """x [R, D], y [C, D] -> of each row the `count` columns of the largest products (all where there are fewer), indices and
    products [R, min(count, C)], the largest first. `chunk` products exist at a time. No gradient."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or count < 1:
        raise ValueError(f"likeliest wants x [R, D], y [C, D] and a positive count, got {tuple(x.shape)}, {tuple(y.shape)}, {count}")
    wide = torch.promote_types(x.dtype, torch.float32)
    count, columns = min(count, y.shape[0]), y.to(wide).T
    found = [(part.to(wide) @ columns).topk(count, dim=1) for part in x.split(max(1, chunk // max(1, y.shape[0])))]
    return torch.cat([f.indices for f in found]), torch.cat([f.values for f in found])


class _Listed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, log_scale: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        total = x.new_zeros(x.shape[0])
        for k in range(index.shape[1] if y.shape[0] else 0):
            total += weight[:, k] * (x * y[index[:, k]]).sum(1)
        total = total * log_scale.exp()
        ctx.save_for_backward(x, y, log_scale, index, weight, total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, y, log_scale, index, weight, total = ctx.saved_tensors
        (upstream,) = gradients
        g = upstream * log_scale.exp()
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        for k in range(index.shape[1] if y.shape[0] else 0):
            part = (g * weight[:, k])[:, None]
            dx += part * y[index[:, k]]
            dy.index_add_(0, index[:, k], part * x)
        return dx, dy, (upstream * total).sum().reshape(log_scale.shape), None, None
