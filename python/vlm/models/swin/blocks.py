"""Pieces of a Swin tower. B pictures, H x W the map, C channels, h heads, w the window's side. Source: swin-v2."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm import ops
from vlm.layers import activation_of
from vlm.models.adapted import weight_of
from vlm.models.swin.options import StageShape, SwinOptions

MAX_LOG_SCALE = math.log(100.0)
BIAS_HIDDEN = 512


class ContinuousBias(nn.Module):
    """A small network from log-spaced offsets to one bias a head, evaluated once for each offset of a window."""

    offsets: Tensor

    def __init__(self, heads: int, window: int, pretrained_window: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, BIAS_HIDDEN)
        self.out = nn.Linear(BIAS_HIDDEN, heads, bias=False)
        self.register_buffer("offsets", log_offsets(window, pretrained_window), persistent=False)

    def forward(self) -> Tensor:
        """[(2 w - 1)^2, heads], each 16 sigmoid(.)"""
        return 16 * torch.sigmoid(self.out(F.relu(self.hidden(self.offsets))))


def log_offsets(window: int, pretrained_window: int = 0) -> Tensor:
    """[(2 w - 1)^2, 2] float32: (t_y, t_x) of offsets -(w - 1)..w - 1, y slowest.

    t = sign(u) log2(1 + |u|) / log2(8) with u = 8 d / (W' - 1), W' the pre-training window or else the own one.
    """
    d = torch.arange(1 - window, window, dtype=torch.float32)
    base = pretrained_window if pretrained_window > 0 else window
    u = 8 * (d / (base - 1) if base > 1 else d)
    t = u.sign() * torch.log2(1 + u.abs()) / math.log2(8)
    return torch.stack(torch.meshgrid(t, t, indexing="ij"), dim=-1).reshape(-1, 2)


class SwinAttention(nn.Module):
    """Cosine attention inside windows. Queries and values have biases, keys none."""

    def __init__(self, options: SwinOptions, shape: StageShape, shift: int) -> None:
        super().__init__()
        self.window, self.shift, self.padding = shape.window, shift, options.padding
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(shape.width)) if options.qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(shape.width)) if options.qkv_bias else None
        self.log_scale = nn.Parameter(torch.full((shape.heads,), math.log(10.0)))
        self.position = ContinuousBias(shape.heads, shape.window, shape.pretrained_window)
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        height, width = x.shape[1:3]
        over = (-height % self.window, -width % self.window)
        fill = self.padding == "attended" and over != (0, 0)
        x = F.pad(x, (0, 0, 0, over[1], 0, over[0])) if fill else x
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        y = ops.window_attention(
            F.linear(x, weight_of(self.qkv), bias), self.scale(), self.position(), window=self.window, shift=self.shift
        )
        return self.out(y[:, :height, :width] if fill else y)

    def scale(self) -> Tensor:
        """[h] factor of the cosine, at most 100; no gradient where it is clamped."""
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp()


class SwinBlock(nn.Module):
    """x + LN(attention(x)), then x + LN(ffn(x)); or both norms at the beginning of their branches."""

    def __init__(self, options: SwinOptions, shape: StageShape, *, shift: int, drop: float) -> None:
        super().__init__()
        self.post, self.drop = options.norm == "res-post", drop
        hidden = int(options.ffn_ratio * shape.width)
        self.attention = SwinAttention(options, shape, shift)
        self.norm1 = nn.LayerNorm(shape.width, eps=options.norm_eps)
        self.up = nn.Linear(shape.width, hidden)
        self.activation = activation_of(options.activation)
        self.down = nn.Linear(hidden, shape.width)
        self.norm2 = nn.LayerNorm(shape.width, eps=options.norm_eps)
        if self.post and options.norm_zero_init:
            for norm in (self.norm1, self.norm2):
                nn.init.zeros_(norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]"""
        if self.post:
            x = x + self.kept(self.norm1(self.attention(x)))
            return x + self.kept(self.norm2(self.ffn(x)))
        x = x + self.kept(self.attention(self.norm1(x)))
        return x + self.kept(self.ffn(self.norm2(x)))

    def ffn(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def kept(self, y: Tensor) -> Tensor:
        """Stochastic depth: the branch of a whole picture is dropped with chance `drop` while training."""
        if not self.training or self.drop == 0:
            return y
        keep = 1 - self.drop
        return y * (torch.rand(y.shape[0], 1, 1, 1, device=y.device) < keep).to(y.dtype) / keep


class PatchMerging(nn.Module):
    """Two by two neighbours side by side, to twice the channels, then a norm: [B, H, W, C] -> [B, H/2, W/2, 2 C], rounded up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=-1)
        return self.norm(self.reduction(x))
