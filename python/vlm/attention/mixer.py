"""What a recurrent mixer is: a layer that keeps a state of fixed size instead of keys and values.

n rows, S positions, C width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

State = tuple[Tensor, ...]
"""What a mixer keeps of the positions read so far; the first axis of every tensor is the row."""


@dataclass(frozen=True)
class MixerShape:
    """What a mixer is built for: one layer of a trunk. layer counts from 0."""

    width: int
    heads: int
    kv_heads: int
    head_width: int
    layer: int
    depth: int
    norm_eps: float


@dataclass(frozen=True)
class Places:
    """What a mixer is told of the positions that it reads.

    position [n, S]; mask bool [n, S], false where there is only padding (anywhere), None without padding; segment [n, S]
    numbers packed documents, None without.
    """

    position: Tensor
    mask: Tensor | None = None
    segment: Tensor | None = None


@dataclass(frozen=True)
class MixerCost:
    """What one layer takes: operations of a position (a multiplication with its addition is 2), and numbers of its state."""

    flops: int
    state: int


class Mixer(Protocol):
    """x [n, S, C] behind what `state` has read -> (mixed [n, S, C], the state after it)."""

    def __call__(self, x: Tensor, places: Places, state: State | None) -> tuple[Tensor, State]: ...


class SimpleRmsNorm(nn.Module):
    """x / rms(x) over the last axis, in float32, without weights. Source: transnormer."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)
