"""What was trained, and on what machine."""

from __future__ import annotations

import shlex
from typing import Any

from vlm.reporting.record import RunRecord
from vlm.reporting.words import count, duration, escape


def _facts(rows: list[tuple[str, Any]]) -> str:
    kept = [(name, value) for name, value in rows if value not in (None, "", {}, [])]
    return (
        '<dl class="facts">'
        + "".join(f"<dt>{escape(n)}</dt><dd>{escape(str(v))}</dd>" for n, v in kept)
        + "</dl>"
    )


def made(run: RunRecord) -> str:
    objectives = run.setting("objectives") or []
    named = ", ".join(str(o.get("kind", o.get("name", "?"))) for o in objectives if isinstance(o, dict))
    optimizer = run.setting("optimizer") or {}
    schedule = run.setting("schedule") or {}
    environment = run.environment
    versions = environment.get("versions") if isinstance(environment.get("versions"), dict) else {}
    command = environment.get("command")
    departs = run.setting("method.departs") or []
    left = _facts(
        [
            ("preset", run.setting("method.key")),
            ("source", run.setting("method.paper")),
            ("data", run.setting("data.source")),
            ("validation", run.setting("data.val")),
            ("starts from", run.setting("start.model") or ("random weights" if run.preset else None)),
            ("parameters", count(run.parameters) if run.parameters else None),
            ("objectives", named),
            (
                "optimizer",
                ", ".join(f"{k} {v}" for k, v in optimizer.items() if not isinstance(v, dict | list)),
            ),
            ("schedule", ", ".join(f"{k} {v}" for k, v in schedule.items())),
            ("updates", count(run.steps)),
            ("batch", run.setting("train.batch_size")),
            ("seed", run.setting("train.seed", 0) if run.preset else None),
            ("departs", "; ".join(map(str, departs)) if isinstance(departs, list) else departs),
        ]
    )
    right = _facts(
        [
            ("time", duration(run.seconds) if run.seconds else None),
            ("machine", environment.get("platform")),
            ("processor", environment.get("processor")),
            ("cores", environment.get("cores")),
            ("threads", environment.get("threads")),
            ("python", environment.get("python")),
            *[(str(name), version) for name, version in (versions or {}).items()],
            ("vlm", environment.get("vlm")),
            ("started", environment.get("started")),
            ("command", shlex.join(map(str, command)) if isinstance(command, list) else command),
        ]
    )
    preset = ""
    if run.preset_text:
        preset = f"<details><summary>The whole preset, as resolved</summary><pre>{escape(run.preset_text)}</pre></details>"
    cards = f'<div class="card"><h3>The method</h3>{left}</div><div class="card"><h3>The machine</h3>{right}</div>'
    return f'<div class="two">{cards}</div>{preset}'
