"""What is in a scene: one to four objects on a grid of nine cells, and how they stand to each other."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "arrow")
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (140, 60, 190),
    "orange": (250, 125, 15),
    "black": (25, 25, 25),
    "pink": (250, 130, 190),
}
SIZES = {"small": 0.075, "medium": 0.115, "large": 0.155}
"""Radius as a share of the side; the largest fits a cell of one third."""
BACKGROUNDS = ((255, 255, 255), (238, 238, 238), (248, 242, 224), (222, 236, 246), (230, 244, 226))
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = {"val": 0, "test": 1}
"""Tenths of all scene compositions; the rest is `train`. A composition belongs to one split for good."""

_COLOR_NAMES = tuple(COLORS)
_SIZE_NAMES = tuple(SIZES)
_DRAWS = 40
MOST_OBJECTS = 4


@dataclass(frozen=True)
class Thing:
    """One object. x, y, radius: shares of the side; cell: 0..8 row by row."""

    shape: str
    color: str
    size: str
    cell: int
    x: float
    y: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def box(self) -> list[float]:
        """[x0, y0, x1, y1] as shares of width and height."""
        r = SIZES[self.size]
        return [round(v, 5) for v in (self.x - r, self.y - r, self.x + r, self.y + r)]


@dataclass(frozen=True)
class Scene:
    """things[0] is the main one: no other is as large. background: RGB."""

    things: tuple[Thing, ...]
    background: tuple[int, int, int]

    @cached_property
    def relations(self) -> list[tuple[int, str, int]]:
        """(i, relation, j) for every ordered pair whose cells differ in that direction."""
        out = []
        for i, a in enumerate(self.things):
            for j, b in enumerate(self.things):
                if i != j:
                    column, row = a.cell % 3 - b.cell % 3, a.cell // 3 - b.cell // 3
                    if column:
                        out.append((i, "left of" if column < 0 else "right of", j))
                    if row:
                        out.append((i, "above" if row < 0 else "below", j))
        return out


def scene_generator(key: int, index: int) -> np.random.Generator:
    """The generator of one scene: key is that of the set (seed and split), index that of the scene."""
    return np.random.Generator(np.random.Philox(key=np.array([key, index], np.uint64)))


def compose(generator: np.random.Generator, split: str, most: int = MOST_OBJECTS) -> Scene:
    """Draw scenes of at most `most` objects until one belongs to `split`; each attempt takes the same number of draws."""
    while True:
        u = generator.random(_DRAWS).tolist()
        count = 1 + int(u[0] * most)
        cells = list(range(9))
        things: list[Thing] = []
        names: set[tuple[str, str]] = set()
        top = int(u[1] * 3) if count == 1 else 1 + int(u[1] * 2)
        for i in range(count):
            a, b, c, d, e, f = u[2 + 6 * i : 8 + 6 * i]
            shape, color = SHAPES[int(a * 8)], _COLOR_NAMES[int(b * 8)]
            if (shape, color) in names:
                continue
            names.add((shape, color))
            size = _SIZE_NAMES[top if i == 0 else int(c * top)]
            cell = cells.pop(int(d * len(cells)))
            room = 1 / 6 - SIZES[size]
            x = (cell % 3 + 0.5) / 3 + (2 * e - 1) * room
            y = (cell // 3 + 0.5) / 3 + (2 * f - 1) * room
            things.append(Thing(shape, color, size, cell, x, y))
        if _split_of(things) == split:
            base = BACKGROUNDS[int(u[26] * len(BACKGROUNDS))]
            shade = int(u[27] * 12)
            return Scene(tuple(things), (base[0] - shade, base[1] - shade, base[2] - shade))


def _split_of(things: list[Thing]) -> str:
    """The split that owns a composition (what stands in which cell), whatever seed drew it."""
    return split_of("|".join(sorted(f"{t.shape},{t.color},{t.size},{t.cell}" for t in things)))


def split_of(text: str) -> str:
    """The split that owns what a text says, for good."""
    tenth = hashlib.blake2b(text.encode(), digest_size=2).digest()[0] % 10
    return "val" if tenth == SPLITS["val"] else "test" if tenth == SPLITS["test"] else "train"
