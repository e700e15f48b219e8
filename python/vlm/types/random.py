"""Keyed randomness: a draw depends on (seed, purpose, what it is for), never on order, worker or packing."""

from __future__ import annotations

import hashlib

import numpy as np

_GAMMA = 0x9E3779B97F4A7C15


def draw_key(seed: int, purpose: str, *parts: int | str) -> int:
    """A 63-bit number from (seed, purpose, parts); equal arguments give equal numbers on every machine."""
    text = "\x1f".join([str(int(seed)), purpose, *(str(part) for part in parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *parts: int | str) -> np.random.Generator:
    """A NumPy generator of its own for (seed, purpose, parts)."""
    return np.random.Generator(np.random.Philox(key=draw_key(seed, purpose, *parts)))


def mix(ids: np.ndarray, key: int) -> np.ndarray:
    """[n] uint64 hashes of uint64 ids under a key (splitmix64): sorting by them shuffles by sample, not by position."""
    with np.errstate(over="ignore"):
        z = ids.astype(np.uint64) + np.uint64(key & 0xFFFFFFFFFFFFFFFF) + np.uint64(_GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))
