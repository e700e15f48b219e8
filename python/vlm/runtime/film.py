"""Clips as pictures: a film strip that keeps its frames. What shows pictures shows the strip, a model of clips reads the frames."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

_FRAMES = "frames"


def film_strip(frames: Sequence[Image.Image]) -> Image.Image:
    """The frames side by side, from left to right in order of time. Raises ValueError without frames."""
    if not frames:
        raise ValueError("film_strip: no frames")
    strip = Image.new("RGB", (sum(frame.width for frame in frames), max(frame.height for frame in frames)))
    left = 0
    for frame in frames:
        strip.paste(frame, (left, 0))
        left += frame.width
    strip.info[_FRAMES] = tuple(frames)
    return strip


def is_clip(picture: object) -> bool:
    """Whether a picture is a strip of frames, even of one."""
    return isinstance(picture, Image.Image) and isinstance(picture.info.get(_FRAMES), tuple)


def frames_of(picture: Image.Image, most: int) -> list[Image.Image]:
    """The frames of a strip, evenly spaced ones where there are more than `most`; any other picture is its only frame."""
    frames = list(picture.info[_FRAMES]) if is_clip(picture) else [picture]
    if len(frames) <= most:
        return frames
    return [frames[(2 * place + 1) * len(frames) // (2 * most)] for place in range(most)]
