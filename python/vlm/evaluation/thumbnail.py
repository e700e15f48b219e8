"""Pictures small enough to keep beside a result."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

from PIL import Image

SIDE = 112


def thumbnail(picture: Image.Image, side: int = SIDE) -> str:
    """A WebP data URI of the whole picture, at most `side` pixels; a small picture keeps its size."""
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=82, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnails(pictures: Mapping[int, Image.Image]) -> dict[int, str]:
    return {number: thumbnail(picture) for number, picture in pictures.items()}
