"""Augmentation: a different view of a picture for every sample and epoch, from a generator of its own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from vlm.runtime.preprocess import Preprocess

_TRIES = 10


def crop_box(
    width: int,
    height: int,
    generator: np.random.Generator,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[float, float, float, float]:
    """A random box (left, top, right, bottom) in pixels with an area share in `scale` and width/height in `ratio`.

    The ratio is relative to the model's square input. After ten misses: the largest centred box within `ratio`.
    """
    draws = generator.random((_TRIES, 4))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw, x_draw, y_draw in draws.tolist():
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        w, h = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if w <= width and h <= height:
            left, top = x_draw * (width - w), y_draw * (height - h)
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, height * aspect), min(height, width / aspect)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def augmented(picture: Image.Image, preprocess: Preprocess, options: dict[str, Any], key: int) -> np.ndarray:
    """uint8 [3, S, S] of an RGB picture under `ImageOptions` (as JSON), drawn from `key`."""
    generator = np.random.Generator(np.random.Philox(key=key))
    if options["augment"] == "random-resized-crop":
        box = crop_box(*picture.size, generator, options["scale"], options["ratio"])
        size = (preprocess.size, preprocess.size)
        pixels = np.asarray(picture.resize(size, preprocess.resampling, box=box)).transpose(2, 0, 1)
    else:
        pixels = preprocess.to_array(picture)
    if options["flip"] and generator.random() < 0.5:
        pixels = pixels[:, :, ::-1]
    return np.ascontiguousarray(pixels)


def flipped(picture: Image.Image, key: int) -> Image.Image:
    """The picture, mirrored half of the time, drawn from `key`: what a picture is given before it is cut into tiles."""
    generator = np.random.Generator(np.random.Philox(key=key))
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else picture
