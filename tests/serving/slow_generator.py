"""A bundle that writes as fast as a test lets it: `gate` holds every token back until it is set."""

from __future__ import annotations

import threading
import time
from typing import Any


class SlowGenerator:
    """Delegates to a bundle; counts the rows of each call."""

    def __init__(self, inner: Any, seconds: float = 0.0) -> None:
        self.inner, self.seconds = inner, seconds
        self.name, self.template, self.length = "slow", inner.template, inner.length
        self.eos_ids: frozenset[int] = inner.eos_ids
        self.gate = threading.Event()
        self.gate.set()
        self.prepared = 0
        self.starts: list[int] = []
        self.advances: list[int] = []

    def self_test(self) -> float:
        return 0.0

    def prepare_image(self, picture, limits):
        self.prepared += 1
        return self.inner.prepare_image(picture, limits)

    def prompt(self, messages, pictures):
        return self.inner.prompt(messages, pictures)

    def positions(self, prompt):
        return self.inner.positions(prompt)

    def text(self, ids):
        return self.inner.text(ids)

    def stepper(self):
        return _Stepper(self, self.inner.stepper())


class _Stepper:
    def __init__(self, owner: SlowGenerator, inner: Any) -> None:
        self.owner, self.inner, self.vocab_size = owner, inner, inner.vocab_size

    def start(self, prompts):
        self.owner.starts.append(len(prompts))
        self.owner.gate.wait(20)
        return self._without_end(self.inner.start(prompts))

    def advance(self, ids):
        self.owner.advances.append(len(ids))
        self.owner.gate.wait(20)
        time.sleep(self.owner.seconds)
        return self._without_end(self.inner.advance(ids))

    def reorder(self, index):
        self.inner.reorder(index)

    def join(self, other):
        self.inner.join(other.inner)

    def _without_end(self, logits):
        """It never ends by itself."""
        logits[:, sorted(self.owner.eos_ids)] = -1e9
        return logits
