"""Rotary positions. B rows, N positions, H heads, D head width."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(position: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, N, D] float32 for positions [B, N]; half-split layout (Llama)."""
    half = torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width
    angles = position[..., None].float() * (theta**-half)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on x [B, H, N, D]."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
