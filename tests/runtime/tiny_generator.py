"""A small recurrent model that reads pictures, in NumPy, with a cache and without one; its rows never mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm.runtime.generation import Prompt

WIDTH = 5
IMAGE, UNKNOWN, EOS = 0, 1, 2
PIECES = [b"", b"?", b"", b"a", b"b", b" c", b"ab", b"\xc3", b"\xa9", "€".encode(), b"\xe2\x82", b"\xac", b"STOP"]
"""Words, whole and halved characters, and two tokens without text."""


class TinyModel:
    """state' = tanh(input + state R), logits = state O; the input is a row of E, or a picture's mean through P."""

    def __init__(self, seed: int = 0, vocab_size: int = len(PIECES), sharpness: float = 1.5) -> None:
        rng = np.random.default_rng(seed)
        self.E, self.R = rng.normal(size=(vocab_size, WIDTH)), rng.normal(size=(WIDTH, WIDTH))
        self.P, self.O = rng.normal(size=(3, WIDTH)), sharpness * rng.normal(size=(WIDTH, vocab_size))
        self.vocab_size = vocab_size

    def step(self, state: np.ndarray, entry: np.ndarray) -> np.ndarray:
        return np.tanh(entry + (state[:, :, None] * self.R).sum(1))

    def logits(self, state: np.ndarray) -> np.ndarray:
        return (state[:, :, None] * self.O).sum(1).astype(np.float32)

    def read(self, prompt: Prompt, more: Sequence[int] = ()) -> np.ndarray:
        """The state [1, H] after a prompt and further tokens; a placeholder that the model itself wrote is no picture."""
        pictures = list(prompt.pictures.get("image", ()))
        entries = [self.E[i] if i != IMAGE else (pictures.pop(0).mean((1, 2))[:, None] * self.P).sum(0) for i in prompt.ids]
        assert not pictures, "a picture without a placeholder"
        state = np.zeros((1, WIDTH))
        for entry in (*entries, *self.E[list(more)]):
            state = self.step(state, entry[None])
        return state


class CachedStepper:
    """Keeps one state a row. rows: how many were computed in each call."""

    def __init__(self, model: TinyModel) -> None:
        self.model, self.vocab_size, self.rows = model, model.vocab_size, []

    def start(self, prompts: Sequence[Prompt]) -> np.ndarray:
        self.state = np.concatenate([self.model.read(p) for p in prompts])
        self.rows.append(len(prompts))
        return self.model.logits(self.state)

    def advance(self, ids: np.ndarray) -> np.ndarray:
        assert ids.dtype == np.int64
        assert ids.shape == (len(self.state),)
        self.state = self.model.step(self.state, self.model.E[ids])
        self.rows.append(len(ids))
        return self.model.logits(self.state)

    def reorder(self, index: np.ndarray) -> None:
        self.state = self.state[index]

    def join(self, other: CachedStepper) -> None:
        self.state = np.concatenate([self.state, other.state])


class RecomputingStepper:
    """Keeps the tokens and reads each row anew for every token."""

    def __init__(self, model: TinyModel) -> None:
        self.model, self.vocab_size = model, model.vocab_size

    def start(self, prompts: Sequence[Prompt]) -> np.ndarray:
        self.texts: list[tuple[Prompt, list[int]]] = [(p, []) for p in prompts]
        return self._logits()

    def _logits(self) -> np.ndarray:
        return np.concatenate([self.model.logits(self.model.read(p, more)) for p, more in self.texts])

    def advance(self, ids: np.ndarray) -> np.ndarray:
        self.texts = [(p, [*more, int(i)]) for (p, more), i in zip(self.texts, ids, strict=True)]
        return self._logits()

    def reorder(self, index: np.ndarray) -> None:
        self.texts = [self.texts[i] for i in index]

    def join(self, other: RecomputingStepper) -> None:
        self.texts += other.texts


class TinyGenerator:
    """A `Generator` over either stepper. A picture takes 3 positions."""

    name = "tiny"
    template: Any = None
    eos_ids = frozenset({EOS})

    def __init__(self, model: TinyModel | None = None, *, cached: bool = True, length: int = 128) -> None:
        self.model, self.length = model or TinyModel(), length
        self.kind = CachedStepper if cached else RecomputingStepper
        self.steppers: list[Any] = []

    def prepare_image(self, picture, limits=None):
        return {"image": np.asarray(picture, np.float32)}

    def prompt(self, messages, pictures):
        raise NotImplementedError("prompts are made by `prompt_of`")

    def positions(self, prompt: Prompt) -> int:
        return len(prompt.ids) + 2 * sum(i == IMAGE for i in prompt.ids)

    def stepper(self):
        self.steppers.append(self.kind(self.model))
        return self.steppers[-1]

    def text(self, ids: Sequence[int]) -> str:
        return b"".join(PIECES[i] for i in ids).decode("utf-8", "replace")


def prompt_of(*ids: int, seed: int = 0) -> Prompt:
    """A prompt with a drawn picture for each placeholder."""
    rng = np.random.default_rng(seed)
    pictures = [rng.normal(size=(3, 2, 2)).astype(np.float32) for i in ids if i == IMAGE]
    return Prompt(ids, {"image": pictures} if pictures else {})
