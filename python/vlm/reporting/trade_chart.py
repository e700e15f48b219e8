"""Score against speed, a line for each way of saving work, as an SVG file that stands alone (a page may hold it as well)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm.reporting.words import escape, number, span, tick

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 62, 20, 22, 52
ROW = 19
"""Height of a line of the legend, pixels."""

_STYLE = """
  .paper { fill: #ffffff; } text { fill: #5d6570; font: 12px system-ui, "Segoe UI", "Noto Sans", "DejaVu Sans", sans-serif; }
  .grid { stroke: #e2dfd7; } .strong { fill: #1f2328; font-weight: 600; } .bar { stroke-width: 1.2; opacity: .45; }
  .curve { fill: none; stroke-width: 2.2; stroke-linejoin: round; } .dot { stroke: none; }
"""
_COLOURS = ("#1f6f78", "#c8553d", "#7a5aa6", "#b0861b", "#3f7d3a", "#4a6fb5", "#8c5a3c")


@dataclass(frozen=True)
class Point:
    """One arm: how fast it is, what it scores, and the score's interval."""

    speed: float
    score: float
    lower: float
    upper: float
    name: str = ""


@dataclass(frozen=True)
class Trade:
    """The arms of one way, in the order in which they are joined."""

    name: str
    points: Sequence[Point]


def trade_chart(title: str, trades: Sequence[Trade], *, across: str, up: str) -> str:
    """The figure as a whole SVG document; '' when no point is finite. across, up: what the axes say."""
    finite = [p for trade in trades for p in trade.points if math.isfinite(p.speed) and math.isfinite(p.score)]
    if not finite:
        return ""
    xs, ys = [p.speed for p in finite], [v for p in finite for v in (p.lower, p.score, p.upper) if math.isfinite(v)]
    columns, x_step = span(min(xs), max(xs))
    lines, y_step = span(min(ys), max(ys))
    height = HEIGHT + ROW * len(trades)
    high, wide = HEIGHT - TOP - BOTTOM, WIDTH - LEFT - RIGHT

    def x_of(value: float) -> float:
        return LEFT + (value - columns[0]) / (columns[-1] - columns[0]) * wide

    def y_of(value: float) -> float:
        return TOP + (lines[-1] - value) / (lines[-1] - lines[0]) * high

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>'
    ]
    for value in lines:
        y = y_of(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y:.1f}" dy=".32em" text-anchor="end">{tick(value, y_step)}</text>')
    for value in columns:
        x = x_of(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{TOP + high}"/>')
        parts.append(f'<text x="{x:.1f}" y="{TOP + high + 17}" text-anchor="middle">{tick(value, x_step)}</text>')
    parts.append(f'<text class="strong" x="{LEFT + wide / 2:.0f}" y="{TOP + high + 38}" text-anchor="middle">{escape(across)}</text>')
    parts.append(
        f'<text class="strong" transform="translate(16 {TOP + high / 2:.0f}) rotate(-90)" text-anchor="middle">{escape(up)}</text>'
    )
    for i, trade in enumerate(trades):
        parts.extend(_drawn(trade, _COLOURS[i % len(_COLOURS)], x_of, y_of))
        y = HEIGHT + ROW * i + 4
        parts.append(f'<rect x="{LEFT}" y="{y - 2}" width="16" height="3" fill="{_COLOURS[i % len(_COLOURS)]}"/>')
        parts.append(f'<text x="{LEFT + 24}" y="{y}" dy=".32em">{escape(trade.name)}</text>')
    return "".join([*parts, "</svg>\n"])


def _drawn(trade: Trade, colour: str, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> list[str]:
    points = [p for p in trade.points if math.isfinite(p.speed) and math.isfinite(p.score)]
    out = []
    for p in points:
        if math.isfinite(p.lower) and math.isfinite(p.upper):
            x = x_of(p.speed)
            out.append(f'<line class="bar" stroke="{colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{y_of(p.lower):.1f}" y2="{y_of(p.upper):.1f}"/>')
    path = " ".join(f"{x_of(p.speed):.1f},{y_of(p.score):.1f}" for p in points)
    out.append(f'<polyline class="curve" stroke="{colour}" points="{path}"/>')
    for p in points:
        said = f"{trade.name}, {p.name}: {number(p.score)} at {number(p.speed)}"
        out.append(f'<circle class="dot" fill="{colour}" cx="{x_of(p.speed):.1f}" cy="{y_of(p.score):.1f}" r="3.6"><title>{escape(said)}</title></circle>')
    return out
