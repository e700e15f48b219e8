"""Line charts as inline SVG: no script, no outside file, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.reporting.words import escape, number, span, tick

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 14, 14, 30
MOST_POINTS = 400


@dataclass(frozen=True)
class Line:
    """One line of a chart. faint: drawn thin behind the others (raw values behind their smooth ones)."""

    name: str
    points: Points
    faint: bool = False


def smooth(points: Points, reach: int | None = None) -> list[tuple[float, float]]:
    """The mean of each point and its `reach` neighbours on either side (fewer at the ends), so that nothing lags.

    Default reach: a thirtieth of the points. Values that are not finite are passed over.
    """
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    reach = max(1, len(kept) // 30) if reach is None else reach
    stride = max(1, len(kept) // MOST_POINTS)  # a mean changes slowly: not every point is needed
    places = sorted({*range(0, len(kept), stride), len(kept) - 1} - {-1})
    out = []
    for i in places:
        near = min(reach, i, len(kept) - 1 - i)
        part = [y for _, y in kept[i - near : i + near + 1]]
        out.append((kept[i][0], math.fsum(y / len(part) for y in part)))
    return out


def thin(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most about `most` points: the lowest and highest of each stretch, so that no spike is lost."""
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    if len(kept) <= most:
        return kept
    out = []
    stretch = len(kept) / (most // 2)
    for i in range(most // 2):
        part = kept[round(i * stretch) : round((i + 1) * stretch)]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        out.extend(sorted(ends))
    return out


def line_chart(
    title: str, lines: Sequence[Line], *, unit: str = "", zero: bool = False
) -> str:
    """A figure with one or several lines over the updates; '' when nothing is to draw.

    zero: the axis begins at 0.
    """
    drawn = [(line, thin(line.points)) for line in lines]
    drawn = [(line, points) for line, points in drawn if points]
    if not drawn:
        return ""
    everything = [p for _, points in drawn for p in points]
    xs = [x for x, _ in everything]
    solid = sorted(y for line, points in drawn for _, y in points if not line.faint or len(drawn) == 1)
    ys = sorted(y for _, y in everything)
    # A few wild first values must not flatten the rest of the curve.
    high = max(solid[-1], ys[min(len(ys) - 1, math.ceil(0.99 * len(ys)))])
    low = min(solid[0], ys[math.floor(0.01 * len(ys))])
    ticks, step = span(0.0 if zero and low >= 0 else low, high)
    bottom, top = ticks[0], ticks[-1]
    first, last = min(xs), max(xs)
    width = last - first or 1.0

    def place(x: float, y: float) -> str:
        px = LEFT + (x - first) / width * (WIDTH - LEFT - RIGHT)
        py = TOP + (top - min(max(y, bottom), top)) / (top - bottom) * (HEIGHT - TOP - BOTTOM)
        return f"{px:.1f},{py:.1f}"

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(_say(title, drawn[-1][1], unit))}">'
    ]
    for value in ticks:
        y = place(first, value).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y}" dy=".32em" text-anchor="end">{tick(value, step)}</text>'
        )
    marks, distance = span(first, last)
    for value in marks:
        if first <= value <= last:
            x = place(value, bottom).split(",")[0]
            parts.append(
                f'<text class="tick" x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{tick(value, distance)}</text>'
            )
    colour = 0
    for line, points in drawn:
        kind = "faint" if line.faint else f"line c{colour % 5}"
        colour += not line.faint
        if len(points) == 1:
            x, y = place(*points[0]).split(",")
            parts.append(f'<circle class="{kind} dot" cx="{x}" cy="{y}" r="3.5"/>')
        else:
            parts.append(f'<polyline class="{kind}" points="{" ".join(place(x, y) for x, y in points)}"/>')
    parts.append("</svg>")
    named = [(line.name, points[-1][1]) for line, points in drawn if not line.faint]
    legend = ""
    if len(named) > 1:
        legend = '<ul class="legend">' + "".join(_entry(i, *entry) for i, entry in enumerate(named)) + "</ul>"
    end = "" if legend else f"{number(drawn[-1][1][-1][1])} {escape(unit)} at the end"
    caption = f"<b>{escape(title)}</b> <span>{end}</span>"
    return f"<figure><figcaption>{caption}</figcaption>{''.join(parts)}{legend}</figure>"


def _entry(place: int, name: str, end: float) -> str:
    return f'<li class="c{place % 5}">{escape(name)} <b>{number(end)}</b></li>'


def _say(title: str, points: Points, unit: str) -> str:
    (x0, y0), (x1, y1) = points[0], points[-1]
    return (
        f"{title}: from {number(y0)} at update {x0:,g} to {number(y1)} {unit} at update {x1:,g}".replace(
            "  ", " "
        )
    )
