"""Draws keyed by (seed, row, step): a row decodes the same alone and in any batch, and from torch and ONNX alike."""

from __future__ import annotations

import hashlib

import numpy as np


def row_key(seed: int, row: int | str) -> int:
    """A 64-bit number from (seed, row); equal arguments give equal numbers on every machine."""
    kind = "s" if isinstance(row, str) else "i"
    text = f"{int(seed)}\x1fdecoding\x1f{kind}{row}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def uniform(key: int, step: int) -> float:
    """A number in [0, 1) with 53 bits, from a row's key and the step alone (Philox, the step as its counter)."""
    return (int(np.random.Philox(key=key, counter=step).random_raw()) >> 11) * 2.0**-53


def draw(logits: np.ndarray, u: float) -> int:
    """The token of [V] whose share of the cumulated probabilities, in order of id, holds u.

    One number a draw and the order of ids: logits that differ by rounding give another token only beside a boundary.
    """
    total = np.cumsum(np.exp(logits - logits.max().astype(np.float64)))
    token = int(np.searchsorted(total, u * total[-1], side="right"))
    # u * total may round up to total itself: the last token that has any share is meant.
    return token if token < len(total) else int(np.searchsorted(total, total[-1], side="left"))
