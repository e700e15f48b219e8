"""A row of digits, drawn with lines: what it says, how it looks, what is asked of it. Source: nvlm (tiles in order).

Pictures may be wider than high, so that a tiler cuts them between digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from vlm.data.scenes.layout import BACKGROUNDS, scene_generator, split_of

INKS = ((25, 25, 25), (31, 90, 200), (44, 110, 44), (180, 30, 30), (110, 40, 150))
_STROKES: dict[int, list[tuple[float, float]]] = {
    0: [(0.5, 0), (0.9, 0.2), (0.9, 0.8), (0.5, 1), (0.1, 0.8), (0.1, 0.2), (0.5, 0)],
    1: [(0.2, 0.25), (0.55, 0), (0.55, 1)],
    2: [(0.1, 0.2), (0.5, 0), (0.9, 0.2), (0.9, 0.4), (0.1, 1), (0.9, 1)],
    3: [(0.1, 0), (0.9, 0), (0.5, 0.4), (0.9, 0.65), (0.8, 0.95), (0.45, 1), (0.1, 0.9)],
    4: [(0.65, 1), (0.65, 0), (0.05, 0.7), (0.95, 0.7)],
    5: [(0.9, 0), (0.2, 0), (0.15, 0.45), (0.6, 0.4), (0.9, 0.65), (0.7, 0.95), (0.1, 0.95)],
    6: [(0.75, 0), (0.2, 0.45), (0.1, 0.75), (0.35, 1), (0.7, 1), (0.9, 0.75), (0.65, 0.5), (0.2, 0.6)],
    7: [(0.1, 0), (0.9, 0), (0.4, 1)],
    8: [(0.5, 0.45), (0.15, 0.2), (0.5, 0), (0.85, 0.2), (0.5, 0.45), (0.1, 0.75), (0.5, 1), (0.9, 0.75), (0.5, 0.45)],
    9: [(0.85, 0.35), (0.5, 0.5), (0.15, 0.25), (0.45, 0), (0.85, 0.15), (0.85, 0.45), (0.55, 1)],
}
"""The line of each digit, in shares of its box."""


@dataclass(frozen=True)
class Digits:
    """number: the digits from left to right. boxes: (x0, y0, x1, y1) of each, in heights of the picture. background, ink:
    RGB. pen: thickness of the line as a share of a digit's height."""

    number: str
    boxes: tuple[tuple[float, float, float, float], ...]
    background: tuple[int, int, int]
    ink: tuple[int, int, int]
    pen: float


def compose(generator: np.random.Generator, split: str, length: int, aspect: float) -> Digits:
    """Draw numbers until one belongs to `split`, then where its digits stand. aspect: width over height."""
    while True:
        number = "".join(str(int(v)) for v in generator.integers(0, 10, length))
        if split_of(number) == split:
            break
    cell = aspect / length
    u = generator.random((length, 3)).tolist()
    boxes = []
    for k in range(length):
        high = min(0.72, 1.4 * cell) * (0.8 + 0.2 * u[k][0])
        wide = 0.6 * high
        x = k * cell + (cell - wide) * (0.5 + 0.6 * (u[k][1] - 0.5))
        y = (1 - high) * (0.5 + 0.6 * (u[k][2] - 0.5))
        boxes.append((x, y, x + wide, y + high))
    background, ink, pen = generator.random(3).tolist()
    return Digits(
        number, tuple(boxes), BACKGROUNDS[int(background * len(BACKGROUNDS))], INKS[int(ink * len(INKS))], 0.1 + 0.06 * pen
    )


def draw(digits: Digits, width: int, height: int) -> Image.Image:
    """An RGB picture of width x height pixels."""
    picture = Image.new("RGB", (2 * width, 2 * height), digits.background)
    pen = ImageDraw.Draw(picture)
    for digit, (x0, y0, x1, y1) in zip(digits.number, digits.boxes):
        points = [
            (2 * height * (x0 + a * (x1 - x0)), 2 * height * (y0 + b * (y1 - y0))) for a, b in _STROKES[int(digit)]
        ]
        thick = max(2, round(2 * height * (y1 - y0) * digits.pen))
        pen.line(points, fill=digits.ink, width=thick, joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            pen.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=digits.ink)
    return picture.reduce(2)


def questions(number: str, draws: Sequence[float]) -> list[dict[str, Any]]:
    """Of each position its digit (`position`), and whether a digit is there (`exists`; yes and no are equally likely, as
    long as some digit is missing). draws: 2 numbers in [0, 1)."""
    out = [
        {"kind": "position", "question": f"what is the digit at position {k}?", "answer": digit}
        for k, digit in enumerate(number, start=1)
    ]
    present = sorted(set(number))
    absent = [digit for digit in "0123456789" if digit not in present]
    yes = draws[0] < 0.5 or not absent
    asked = (present if yes else absent)[int(draws[1] * len(present if yes else absent))]
    out.append({"kind": "exists", "question": f"is there {'an' if asked == '8' else 'a'} {asked}?", "answer": "yes" if yes else "no"})
    return out


class DigitsReader:
    """Recipe: the index of the picture. spec: `key` of the set, `split`, `length`, `width` and `height` in pixels."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.key, self.split, self.length = int(spec["key"]), str(spec["split"]), int(spec["length"])
        self.width, self.height = int(spec["width"]), int(spec["height"])

    def read(self, recipe: Any) -> dict[str, Any]:
        """Fields `image` (drawn), `caption`, `captions`, `number` ("4072"), `concept` (the same), `boxes` (shares of width
        and height), `questions`."""
        digits, fields = self._digits(recipe)
        return {"image": draw(digits, self.width, self.height), **fields}

    def fields(self, recipe: Any) -> dict[str, Any]:
        """The same without the picture."""
        return self._digits(recipe)[1]

    def _digits(self, recipe: Any) -> tuple[Digits, dict[str, Any]]:
        generator = scene_generator(self.key, int(recipe))
        aspect = self.width / self.height
        digits = compose(generator, self.split, self.length, aspect)
        draws = generator.random(3).tolist()
        spaced = " ".join(digits.number)
        texts = [f"the digits {spaced}", f"a row of digits: {spaced}", f"{spaced}"]
        return digits, {
            "caption": texts[int(draws[2] * len(texts))],
            "captions": texts,
            "number": digits.number,
            "concept": digits.number,
            "boxes": [[round(v, 5) for v in (x0 / aspect, y0, x1 / aspect, y1)] for x0, y0, x1, y1 in digits.boxes],
            "questions": questions(digits.number, draws),
        }
