"""Boxes as text, in shares of the picture that the model sees. Source: infmllm.

A box of the stored picture is moved by the model's own resizing, cropping or padding first, and only then is divided
by the side: the answer agrees with what is seen.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from vlm.data.samples import BadSample
from vlm.runtime.preprocess import Preprocess


def seen_box(box: Any, width: int, height: int, preprocess: Preprocess) -> tuple[float, float, float, float] | None:
    """(x0, y0, x1, y1) as shares of the model's square, of a box in shares of a picture of width x height pixels.

    Clipped to what is seen; None when the crop leaves nothing of it. Raises BadSample when it is no box.
    """
    numbers = isinstance(box, list | tuple) and len(box) == 4 and all(
        isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v <= 1 for v in box
    )  # fmt: skip
    if not numbers or box[0] > box[2] or box[1] > box[3]:
        raise BadSample("bad_box", repr(box)[:80])
    sx, sy, dx, dy = _moved(width, height, preprocess)
    x0, x1 = (min(1.0, max(0.0, v * sx + dx)) for v in (box[0], box[2]))
    y0, y1 = (min(1.0, max(0.0, v * sy + dy)) for v in (box[1], box[3]))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def _moved(width: int, height: int, preprocess: Preprocess) -> tuple[float, float, float, float]:
    """(scale x, scale y, shift x, shift y) from shares of the picture to shares of the square, as `to_array` does it."""
    size = preprocess.size
    if (width, height) == (size, size) or preprocess.resize == "squash":
        return 1.0, 1.0, 0.0, 0.0
    if preprocess.resize == "shortest":
        short = min(width, height)
        new_width = size if width == short else int(size * width / height)
        new_height = size if height == short else int(size * height / width)
        left, top = (new_width - size) // 2, (new_height - size) // 2
        return new_width / size, new_height / size, -left / size, -top / size
    scale = min(size / width, size / height)
    inner = max(1, int(width * scale)), max(1, int(height * scale))
    left, top = ceil((size - inner[0]) / 2), ceil((size - inner[1]) / 2)
    return inner[0] / size, inner[1] / size, left / size, top / size


def box_text(box: tuple[float, float, float, float], decimals: int) -> str:
    """`[0.12, 0.34, 0.56, 0.78]`."""
    return "[" + ", ".join(f"{v:.{decimals}f}" for v in box) + "]"
