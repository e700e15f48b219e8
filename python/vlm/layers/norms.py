"""Norms by the name that a preset gives them, and vectors of unit length."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.attention.mixer import SimpleRmsNorm

NormKind = Literal["layernorm", "rmsnorm", "srms"]


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def norm_of(kind: NormKind, width: int, eps: float) -> nn.Module:
    """The norm named in a preset; srms is the root mean square norm without weights."""
    if kind == "srms":
        return SimpleRmsNorm(eps)
    return RmsNorm(width, eps) if kind == "rmsnorm" else nn.LayerNorm(width, eps=eps)


def normalise(x: Tensor) -> Tensor:
    """Unit length over the last axis, in float32."""
    return F.normalize(x.float(), dim=-1)
