"""Pictures drawn by the package, for golden vectors and self-tests: no user's picture ever enters a bundle."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

GOLDEN_TEXTS = ("a red circle", "a photo of a blue square on a yellow background", "two small green triangles", "x")
GOLDEN_SIZES = ((96, 96), (131, 77), (61, 190))
ODD_SIZES = (
    (1, 1), (2, 3), (7, 5), (16, 16), (17, 64), (64, 64), (63, 65), (100, 31), (33, 200), (224, 224), (225, 223),
    (320, 240), (241, 319), (500, 375), (375, 501), (640, 97), (99, 801),
)  # fmt: skip
"""Width and height."""


def drawn_picture(width: int, height: int, seed: int) -> Image.Image:
    """An RGB picture of overlapping coloured shapes over a gradient; equal arguments give equal pixels."""
    random = np.random.default_rng([seed, width, height])
    first, second = random.integers(0, 256, (2, 3))
    ramp = np.linspace(0, 1, width)[None, :, None] * np.linspace(0.3, 1, height)[:, None, None]
    picture = Image.fromarray((first + (second - first) * ramp).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = float(random.integers(0, width)), float(random.integers(0, height))
        radius = float(random.uniform(0.1, 0.35)) * min(width, height)
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        box = (x - radius, y - radius, x + radius, y + radius)
        kind = int(random.integers(0, 3))
        if kind == 0:
            draw.ellipse(box, fill=colour)
        elif kind == 1:
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)
    return picture
