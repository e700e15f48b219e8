"""What can embed pictures and texts: a bundle here, a torch model in `vlm.evaluation`, used alike.

n rows, m rows, E embedding width, S side of the model's input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

Picture = bytes | str | os.PathLike[str] | Image.Image
"""Encoded bytes, a path, or a decoded picture."""
Form = Literal["softmax", "sigmoid"]


@runtime_checkable
class Embedder(Protocol):
    """Pictures and texts to one space of unit vectors.

    A score is scale * cosine + bias; `form` says whether the scores of one picture compete (softmax) or stand alone.
    """

    name: str
    scale: float
    bias: float
    form: Form

    def encode_image(self, pictures: Sequence[Picture]) -> np.ndarray:
        """[n, E] float32, unit length. Raises BadPicture for the first picture that is refused."""
        ...

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """[n, E] float32, unit length."""
        ...


@runtime_checkable
class PreparingEmbedder(Embedder, Protocol):
    """An embedder that can turn one picture into its small input first, so that a queue never holds full pictures."""

    def prepare_image(self, picture: Picture, limits: PictureLimits = DEFAULT_LIMITS) -> np.ndarray:
        """float32 [3, S, S], normalised. Raises BadPicture."""
        ...

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared pictures to [n, E] float32, unit length."""
        ...


def normalise(x: np.ndarray) -> np.ndarray:
    """Rows of [n, E] scaled to unit length, float32; a row of zeros stays zero."""
    x = x.astype(np.float32, copy=False)
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.maximum(length, np.float32(1e-12))


def scores(embedder: Embedder, images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """scale * cosine + bias of unit vectors [n, E] and [m, E]: float32 [n, m]."""
    return np.float32(embedder.scale) * (images @ texts.T) + np.float32(embedder.bias)


def probabilities(values: np.ndarray, form: Form) -> np.ndarray:
    """Scores [n, m] to probabilities: over the m texts of each picture (softmax), or each pair alone (sigmoid)."""
    values = values.astype(np.float64)
    if form == "sigmoid":
        positive = np.exp(-np.abs(values))
        return np.where(values >= 0, 1 / (1 + positive), positive / (1 + positive)).astype(np.float32)
    shifted = np.exp(values - values.max(axis=-1, keepdims=True))
    return (shifted / shifted.sum(axis=-1, keepdims=True)).astype(np.float32)
