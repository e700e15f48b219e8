"""The random bits of attention dropout: a hash of (seed, b, h, i, j), the same here and in the native core."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B1
_LOW = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 on numbers below 2^32 held in int64."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & _LOW
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & _LOW
    return x ^ (x >> 16)


def drop_below(p: float) -> int:
    """Pairs whose hash is below this number are dropped."""
    return min(int(p * 2**32), 2**32 - 1)


def kept_pairs(p: float, seed: int, batch: int, heads: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [B, H, N, M], false where dropout removes a probability."""
    key = torch.tensor(seed & _LOW, device=device) ^ _mix(torch.tensor(((seed >> 32) + _GOLDEN) & _LOW, device=device))
    key = _mix(key)
    for axis, length in enumerate((batch, heads, queries, keys)):
        shape = [1] * 4
        shape[axis] = length
        counter = torch.arange(length, device=device).view(shape)
        key = _mix((key + counter * _GOLDEN) & _LOW)
    return key >= drop_below(p)
