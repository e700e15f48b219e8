"""Diffusion noise on pictures. Source: povid.

x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps with abar_t the product of 1 - beta up to step t, x in 0..1.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def signal_shares(steps: int, betas: dict[str, Any]) -> np.ndarray:
    """abar [steps] float64 of a `Betas` table (as JSON)."""
    x = np.linspace(betas["from"], betas["to"], steps, dtype=np.float64)
    beta = betas["low"] + (betas["high"] - betas["low"]) / (1 + np.exp(-x))
    return np.cumprod(1 - beta)


def noisy(pixels: np.ndarray, abar: float, key: int) -> np.ndarray:
    """float32 in [0, 1], the shape of `pixels` (uint8, or float in 0..1), drawn from `key`; clamped, so that no later
    conversion wraps around."""
    return np.clip(unclamped(pixels, abar, key), 0, 1)


def unclamped(pixels: np.ndarray, abar: float, key: int) -> np.ndarray:
    """The same before clamping: mean sqrt(abar) x, standard deviation sqrt(1 - abar)."""
    x = pixels.astype(np.float32) / np.float32(255) if pixels.dtype == np.uint8 else pixels.astype(np.float32)
    eps = np.random.Generator(np.random.Philox(key=key)).standard_normal(x.shape, dtype=np.float32)
    return np.float32(abar**0.5) * x + np.float32((1 - abar) ** 0.5) * eps
