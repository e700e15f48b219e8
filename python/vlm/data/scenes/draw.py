"""Paint a scene: polygons at twice the size, then averaged down for smooth edges."""

from __future__ import annotations

import math

from PIL import Image, ImageDraw

from vlm.data.scenes.layout import COLORS, SIZES, Scene

_STAR = [
    (
        math.sin(i * math.pi / 5) * (1.0 if i % 2 == 0 else 0.42),
        -math.cos(i * math.pi / 5) * (1.0 if i % 2 == 0 else 0.42),
    )
    for i in range(10)
]
_C = 0.36
_OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (0.95, 0.85), (-0.95, 0.85)],
    "diamond": [(0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0)],
    "star": _STAR,
    "cross": [
        (-_C, -1), (_C, -1), (_C, -_C), (1, -_C), (1, _C), (_C, _C),
        (_C, 1), (-_C, 1), (-_C, _C), (-1, _C), (-1, -_C), (-_C, -_C),
    ],
    "arrow": [(-1, -0.32), (0.05, -0.32), (0.05, -0.9), (1, 0), (0.05, 0.9), (0.05, 0.32), (-1, 0.32)],
}  # fmt: skip
"""Corners around the origin, within the unit circle's box."""


def draw(scene: Scene, size: int) -> Image.Image:
    """An RGB picture of `size` x `size` pixels."""
    side = 2 * size
    picture = Image.new("RGB", (side, side), scene.background)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y, r, color = thing.x * side, thing.y * side, SIZES[thing.size] * side, COLORS[thing.color]
        outline = _OUTLINES.get(thing.shape)
        if outline is not None:
            pen.polygon([(x + a * r, y + b * r) for a, b in outline], fill=color)
        else:
            pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
            if thing.shape == "ring":
                inner = 0.55 * r
                pen.ellipse((x - inner, y - inner, x + inner, y + inner), fill=scene.background)
    return picture.reduce(2)
