"""An embedder whose answers and speed a test decides: its vectors say which text was given."""

from __future__ import annotations

import threading
import time
import zlib

import numpy as np


class SlowEmbedder:
    """Unit vectors that depend on the text alone; `gate` holds every call back until it is set."""

    name, scale, bias, form, width = "slow", 10.0, 0.0, "softmax", 8

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[list[str]] = []

    def self_test(self) -> float:
        return 1.0

    def encode_text(self, texts):
        self.calls.append(list(texts))
        self.gate.wait(20)
        time.sleep(self.seconds)
        return np.stack([vector(text) for text in texts])

    def encode_image(self, pictures):
        return np.stack([vector(str(len(p))) for p in pictures])


def vector(text: str) -> np.ndarray:
    x = np.random.default_rng(zlib.crc32(text.encode())).normal(size=8).astype(np.float32)
    return x / np.linalg.norm(x)
