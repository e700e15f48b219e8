"""Draw measured rows as a Markdown table: `vlm bench --json > rows.json`, `python -m vlm.bench.table rows.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

HEAD = ("case", "native ms", "dispatched ms", "peer ms", "ratio", "native ratio", "target", "our peak MiB", "peer peak MiB")
KEYS = ("case", "native_ms", "dispatched_ms", "peer_ms", "ratio", "native_ratio", "target", "ours_peak_mb", "peer_peak_mb")


def verdict(row: Mapping[str, object]) -> str:
    """"met", "missed", or empty where no target was set or the peer did not run."""
    kernel = row["native_ms"] is not None  # a case of a whole model has no arm `native`
    target, reached = row["target"], row["native_ratio" if kernel else "ratio"]
    if not isinstance(target, float | int) or not isinstance(reached, float | int):
        return ""
    return "met" if reached >= target else "missed"


def markdown(rows: Iterable[Mapping[str, object]]) -> str:
    rows = list(rows)
    lines = ["| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
    for row in rows:
        cells = [_cell(row[key]) for key in KEYS]
        judged = verdict(row)
        if judged:
            cells[KEYS.index("target")] += f" ({judged})"
        lines.append("| " + " | ".join(cells) + " |")
    told = [f"- {row['case']}: {_told(row['details'])}" for row in rows if isinstance(row.get("details"), Mapping)]
    return "\n".join([*lines, "", *told] if told else lines)


def _told(details: object) -> str:
    """{"a": 1, "b": {"c": 0.25}} -> "a 1, b (c 0.25)"."""
    if isinstance(details, Mapping):
        parts = (f"{name} ({_told(value)})" if isinstance(value, Mapping) else f"{name} {_told(value)}" for name, value in details.items())
        return ", ".join(parts)
    return f"{details:.4g}" if isinstance(details, float) else str(details)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{value:.0f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    print(markdown(json.loads(Path(sys.argv[1]).read_text())))
