"""Rows of two caches in one: the shorter is padded by zeros."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def joined_left(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """The rows of both (dimension 0), the shorter along `dim` padded before its beginning by zeros (false)."""
    size = max(one.shape[dim], other.shape[dim])
    behind = (0, 0) * (one.dim() - 1 - dim)
    return torch.cat([F.pad(t, (*behind, size - t.shape[dim], 0)) for t in (one, other)])


def joined_right(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """The rows of both (dimension 0), the shorter along `dim` padded behind its end by zeros (false)."""
    size = max(one.shape[dim], other.shape[dim])
    behind = (0, 0) * (one.dim() - 1 - dim)
    return torch.cat([F.pad(t, (*behind, 0, size - t.shape[dim])) for t in (one, other)])
