"""Gated linear attention with decay as a mixer: `mixer = { kind = "linear-decay" }`. Source: transnormer.

n rows, S positions, C width, H heads, G key and value heads, D head width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.attention.mixer import MixerCost, MixerShape, Places, SimpleRmsNorm, State
from vlm.config.options import Options

Slopes = Literal["alibi", "exp8", "none"]


class LinearDecayOptions(Options):
    """silu(q), silu(k), v, decayed sums, a norm over all heads together, a gate; linear in length."""

    kind: Literal["linear-decay"] = "linear-decay"
    slopes: Slopes = Field("alibi", description="-log of the decay by head: 2^(-8h/H) (alibi, the released code), 8h/H (exp8, the "
                           "paper), or no decay at all")
    layer_decay: bool = Field(True, description="slopes shrink with the layer; the last one hardly decays")
    learned: bool = Field(False, description="the slopes are parameters, begun at these values")
    lrpe: tuple[int, ...] = Field((0,), description="layers, from 0, with learned rotary-like positions of queries and keys")
    gate: bool = Field(True, description="the result is multiplied by a projection of the input")
    norm: bool = Field(True, description="root mean square norm of the result over all heads together")
    chunk: int | None = Field(None, ge=1, le=256, description="positions computed at once; default: measured")

    @property
    def exports(self) -> bool:
        """Whether a graph of whole rows can be exported."""
        return True

    def cost(self, shape: MixerShape) -> MixerCost:
        """Projections 2 C D (2 H + 2 G), with a gate 2 C D H more; the recurrence 4 H D_k D: k v^T is added to the state, q
        reads it. D_k is D, or 2 D in a layer of `lrpe`. A kernel that goes by chunks does more, to be faster."""
        inner, keys = shape.heads * shape.head_width, shape.head_width * (2 if shape.layer in self.lrpe else 1)
        projections = (2 + self.gate) * inner + 2 * shape.kv_heads * shape.head_width
        return MixerCost(2 * shape.width * projections + 4 * inner * keys, inner * keys)

    def build(self, shape: MixerShape) -> LinearDecay:
        return LinearDecay(self, shape)


def slopes_of(kind: Slopes, heads: int) -> list[float]:
    """[H] -log(decay) of a layer without regard to its depth."""
    if kind == "none":
        return [0.0] * heads
    if kind == "exp8":
        return [8.0 * h / heads for h in range(1, heads + 1)]
    power = 2 ** math.floor(math.log2(heads))
    own = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    return own + [2.0 ** (-4.0 * h / power) for h in range(1, 2 * (heads - power), 2)]  # ALiBi between powers of two


def layer_factor(kind: Slopes, layer: int, depth: int) -> float:
    """By what the slopes of a layer, from 0, are multiplied."""
    if kind == "exp8":
        return 1.0 - layer / depth
    return 1.0 if depth == 1 else 1.0 - layer / (depth - 1) + 1e-5


class LinearDecay(nn.Module):
    """GLA: the state is [n, H, D, D] in float32 however long the row."""

    slopes: Tensor

    def __init__(self, options: LinearDecayOptions, shape: MixerShape) -> None:
        super().__init__()
        self.options, self.shape = options, shape
        inner, kv_inner = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        self.q = nn.Linear(shape.width, inner, bias=False)
        self.k = nn.Linear(shape.width, kv_inner, bias=False)
        self.v = nn.Linear(shape.width, kv_inner, bias=False)
        self.gate = nn.Linear(shape.width, inner, bias=False) if options.gate else None
        self.out = nn.Linear(inner, shape.width, bias=False)
        self.norm = SimpleRmsNorm(shape.norm_eps) if options.norm else nn.Identity()
        factor = layer_factor(options.slopes, shape.layer, shape.depth) if options.layer_decay else 1.0
        slopes = torch.tensor(slopes_of(options.slopes, shape.heads)) * factor
        if options.learned:
            self.log_slopes = nn.Parameter(slopes.clamp(min=1e-6).log())
        else:
            self.register_buffer("slopes", slopes, persistent=False)
        self.theta = None
        if shape.layer in options.lrpe:
            place = torch.arange(inner, dtype=torch.float32).view(shape.heads, shape.head_width)
            self.theta = nn.Parameter(10000.0 ** (-2.0 * place / inner))
        for linear in (self.q, self.k, self.v, self.gate):
            if linear is not None:
                nn.init.normal_(linear.weight, std=shape.width**-0.5)
        nn.init.normal_(self.out.weight, std=shape.width**-0.5 * (2 * shape.depth) ** -0.5)

    def log_decay(self) -> Tensor:
        """[H], at most 0"""
        return -self.log_slopes.exp() if self.options.learned else -self.slopes

    def forward(self, x: Tensor, places: Places, state: State | None) -> tuple[Tensor, State]:
        """See `vlm.attention.mixer.Mixer`."""
        q, k, v = self._heads(F.silu(self.q(x))), self._heads(F.silu(self.k(x))), self._heads(self.v(x))
        repeat = self.shape.heads // self.shape.kv_heads
        if repeat > 1:
            k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        if self.theta is not None:
            q, k = positions_inside(q, places.position, self.theta), positions_inside(k, places.position, self.theta)
        mixed, last = ops.linear_decay(q, k, v, self.log_decay(), state=None if state is None else state[0],
                                       key_mask=places.mask, segment=places.segment, chunk=self.options.chunk)
        y = self.norm(mixed.transpose(1, 2).flatten(2))
        return self.out(y if self.gate is None else self.gate(x) * y), (last,)

    def _heads(self, x: Tensor) -> Tensor:
        """[n, S, H * D] -> [n, H, S, D]"""
        return x.unflatten(-1, (-1, self.shape.head_width)).transpose(1, 2)


def positions_inside(x: Tensor, position: Tensor, theta: Tensor) -> Tensor:
    """LRPE: x [n, H, S, D] at positions [n, S] -> [n, H, S, 2 D], so that <x~_s, y~_t> = sum_r x_r y_r cos((s - t) theta_r).

    theta [H, D] is learned.
    """
    angle = position[:, None, :, None].float() * theta.float()[None, :, None]
    return torch.cat([x * angle.cos().to(x.dtype), x * angle.sin().to(x.dtype)], -1)
