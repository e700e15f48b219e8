"""A shape that moves: clips whose direction only the order of the frames tells. Source: xclip (a small check of its claim).

Every clip has a twin, the same frames the other way round, and is as likely as it: what forgets the order of the frames
knows at most whether the shape moves along a row or along a column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.scenes.draw import draw
from vlm.data.scenes.layout import BACKGROUNDS, COLORS, SHAPES, SIZES, Scene, Thing, scene_generator, split_of
from vlm.runtime.film import film_strip

DIRECTIONS = ("left", "right", "up", "down")
LANES = 8
_COLOR_NAMES, _SIZE_NAMES = tuple(COLORS), tuple(SIZES)


@dataclass(frozen=True)
class Motion:
    """direction: one of `DIRECTIONS`; track: centres (x, y) of the frames, shares of the side; lane: where it runs, 0 to 7."""

    shape: str
    color: str
    size: str
    direction: str
    lane: int
    track: tuple[tuple[float, float], ...]
    background: tuple[int, int, int]

    @property
    def concept(self) -> str:
        """What belongs to one split: shape, colour, axis and lane, but not which way along it."""
        axis = "row" if self.direction in ("left", "right") else "column"
        return f"{self.color} {self.shape} {axis} {self.lane}"


def compose(generator: np.random.Generator, split: str, frames: int) -> Motion:
    """Draw motions until one belongs to `split`; each attempt takes the same number of draws."""
    while True:
        u = generator.random(9).tolist()
        direction = DIRECTIONS[int(u[0] * 4)]
        size = _SIZE_NAMES[int(u[3] * len(_SIZE_NAMES))]
        radius = SIZES[size]
        lane = int(u[4] * LANES)
        across = radius + (1 - 2 * radius) * (lane + u[5]) / LANES
        span = 0.35 + (0.65 - 2 * radius) * u[6]
        start = radius + (1 - 2 * radius - span) * u[7]
        along = [start + span * k / max(1, frames - 1) for k in range(frames)]
        if direction in ("left", "up"):
            along.reverse()
        track = tuple((a, across) if direction in ("left", "right") else (across, a) for a in along)
        shape, color = SHAPES[int(u[1] * len(SHAPES))], _COLOR_NAMES[int(u[2] * len(_COLOR_NAMES))]
        motion = Motion(shape, color, size, direction, lane, track, BACKGROUNDS[int(u[8] * len(BACKGROUNDS))])
        if split_of(motion.concept) == split:
            return motion


def draw_frames(motion: Motion, side: int) -> list[Image.Image]:
    """RGB pictures of side x side pixels in order of time."""
    return [
        draw(Scene((Thing(motion.shape, motion.color, motion.size, 0, x, y),), motion.background), side) for x, y in motion.track
    ]


class ClipsReader:
    """Recipe: the index of the clip. spec: `key` of the set, `split`, `frames`, `size` in pixels."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.key, self.split = int(spec["key"]), str(spec["split"])
        self.frames, self.size = int(spec["frames"]), int(spec["size"])

    def read(self, recipe: Any) -> dict[str, Any]:
        """Fields `image` (a film strip of the frames), `caption`, `captions`, `direction`, `shape`, `color`, `name`, `lane`,
        `concept`."""
        motion = self._motion(recipe)
        return {"image": film_strip(draw_frames(motion, self.size)), **_fields(motion)}

    def fields(self, recipe: Any) -> dict[str, Any]:
        """The same without the frames."""
        return _fields(self._motion(recipe))

    def _motion(self, recipe: Any) -> Motion:
        return compose(scene_generator(self.key, int(recipe)), self.split, self.frames)


def _fields(motion: Motion) -> dict[str, Any]:
    name, to = f"{motion.color} {motion.shape}", motion.direction
    texts = [f"a {name} moves {to}" if motion.color != "orange" else f"an {name} moves {to}", f"{name}, moving {to}"]
    return {
        "caption": texts[0],
        "captions": texts,
        "direction": to,
        "shape": motion.shape,
        "color": motion.color,
        "name": name,
        "lane": motion.lane,
        "concept": motion.concept,
    }
