"""Results as a small table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlm.evaluation.result import Result, flatten

PERCENT = ("retrieval", "zero-shot", "linear-probe", "text-probe", "classification", "vqa", "grounding", "hallucination", "preference", "agreement",
           "localisation")
"""Tasks whose figures are percentages, but for COUNTS."""

COUNTS = frozenset({"mentions", "objects_named", "margin", "divergence"})
"""Figures of such tasks in a unit of their own: objects a caption, nats an answer, nats a token."""

CONTROLS = ("shuffled", "none", "names", "random-words", "other-class")
OVER = "over_"
"""Before the name of a control: the figure less the control's."""


def is_percent(task: str, path: str) -> bool:
    """Whether a figure of a task is a percentage."""
    name = path.rpartition("/")[2]
    if task == "caption":
        return name.startswith(("bleu_", "rouge_"))
    return task in PERCENT and name not in COUNTS


def say(task: str, path: str, value: float) -> str:
    """A figure as it is printed; a difference with its sign."""
    text = share(value) if is_percent(task, path) else number(value)
    return f"+{text}" if path.startswith(OVER) and value > 0 else text


def bounds_of(intervals: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """path -> (lower, upper)."""
    flat = dict(flatten(intervals))
    return {
        path.removesuffix("/lower"): (value, flat[path.removesuffix("lower") + "upper"])
        for path, value in flat.items()
        if path.endswith("/lower")
    }


def number(value: float) -> str:
    """Four figures at most: 0.0123, 1.234, 45.6, 1234."""
    size = abs(value)
    return (
        f"{value:.1f}"
        if 10 <= size < 1000
        else f"{value:,.0f}"
        if size >= 1000
        else f"{value:.3g}"
        if size < 1
        else f"{value:.2f}"
    )


def share(value: float) -> str:
    """A percentage: 45.6, 1.0, 0.35, 0."""
    return "0" if value == 0 else f"{value:.2f}" if abs(value) < 1 else f"{value:.1f}"


def controls_of(flat: Mapping[str, float]) -> list[str]:
    """The controls whose figures stand among others."""
    return [name for name in CONTROLS if any(path.startswith(f"{name}/") for path in flat)]


def is_own(path: str, controls: Sequence[str]) -> bool:
    """Whether a figure is the model's own: neither a control's nor a difference to one."""
    return path.partition("/")[0] not in {*controls, *(OVER + name for name in controls)}


def rows_of(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """(metric, value, interval, chance) of each figure, then for each control its value and what the model gains over
    it, with the interval of the gain."""
    chance = dict(flatten(result.get("chance") or {}))
    bounds = bounds_of(result.get("intervals") or {})
    task = str(result["task"])
    flat = dict(flatten(result["metrics"]))
    controls = controls_of(flat)

    def between(path: str) -> str:
        return " .. ".join(say(task, path, end) for end in bounds[path]) if path in bounds else ""

    out = []
    for path, value in flat.items():
        if not is_own(path, controls):
            continue
        row = [path.replace("_", " ").replace("/", "  "), say(task, path, value), between(path)]
        row.append(say(task, path, chance[path]) if path in chance else "")
        for name in controls:
            over = f"{OVER}{name}/{path}"
            row.append(say(task, path, flat[f"{name}/{path}"]) if f"{name}/{path}" in flat else "")
            row.append(f"{say(task, over, flat[over])} ({between(over)})" if over in flat and over in bounds else "")
        out.append(tuple(row))
    return out


def table_of(result: Result | Mapping[str, Any]) -> str:
    """A heading and one line a figure, aligned."""
    value: Mapping[str, Any] = result.as_json() if isinstance(result, Result) else result
    unit = ", percent" if value["task"] in PERCENT else ""
    title = (
        value["task"]
        if value.get("name", value["task"]) == value["task"]
        else f"{value['name']} ({value['task']})"
    )
    head = f"{title}: {value['samples']:,} samples of {value.get('data', {}).get('uri', 'memory')}{unit}"
    heads = [head for name in controls_of(dict(flatten(value["metrics"]))) for head in (name, f"gain over {name}")]
    rows = [("", "value", "95% interval", "chance", *heads), *rows_of(value)]
    widths = [max(len(row[column]) for row in rows) for column in range(4 + len(heads))]
    lines = [head]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  " + "  ".join(cells).rstrip())
    bad = value.get("bad") or {}
    if bad.get("count"):
        lines.append(f"  {bad['count']} bad samples left out, first: {bad['first'][0]}")
    return "\n".join(lines)
