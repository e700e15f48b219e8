"""`RUN/model/README.md`: what the weights are, how they were made and measured, and how to make them again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from vlm.evaluation.table import rows_of
from vlm.reporting.record import RunRecord, read_run
from vlm.reporting.words import count, duration

NAME = "README.md"
MARK = "<!-- made by vlm; a card without this line is left alone -->"
MAX_PRESET = 200_000
"""Characters of a preset that is shown whole."""

_PIPELINE = {
    "dual-encoder": "zero-shot-image-classification", "language": "text-generation", "vision": "image-feature-extraction",
    "vision-language": "image-text-to-text",
}
_USES = {
    "dual-encoder": ['vlm predict {} photo.jpg --labels "a cat,a dog"', "vlm embed {} --images - < paths.txt"],
    "language": ['vlm generate {} --prompt "once"'],
    "vision": ["vlm embed {} --images - < paths.txt"],
    "vision-language": ['vlm generate {} --image photo.jpg --prompt "what is this?"'],
}


def write_card(root: str | Path) -> Path | None:
    """Writes the card of a finished run and returns its path; None where there is no model yet, or a card by another hand.

    Raises DataError for a directory that is no run.
    """
    run = read_run(root)
    path = run.root / "model" / NAME
    if not run.finished or (path.exists() and MARK not in path.read_text(encoding="utf-8", errors="replace")):
        return None
    new = path.with_name(f".{NAME}.new")
    new.write_text(render_card(run), encoding="utf-8")
    new.replace(path)
    return path


def render_card(run: RunRecord) -> str:
    """Markdown with the YAML header of a model card; what is not known is left out."""
    config = _config(run.root)
    kind = str(run.setting("model.kind", ""))
    key = run.setting("method.key")
    published = not str(config.get("model_type", "vlm")).startswith("vlm")
    header = ["---", f"library_name: {'transformers' if published else 'vlm-forge'}"]
    if kind in _PIPELINE:
        header.append(f"pipeline_tag: {_PIPELINE[kind]}")
    header += ["tags:", "- vlm-forge", *([f"- {key}"] if key else []), "---"]
    parts = [
        "\n".join(header), f"# {_line(run.title)}", _lead(run, kind), *_use(config, kind, published), *_made(run), *_measured(run),
        *_again(run), MARK,
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _lead(run: RunRecord, kind: str) -> str:
    size = f" of {count(run.parameters)} parameters" if run.parameters else ""
    article = "An" if kind[:1] in "aeiou" else "A"
    paper = run.setting("method.paper")
    departs = run.setting("method.departs") or []
    after = f" after *{_line(str(paper))}*" if paper else ""
    said = f"{article} {kind or 'trained'} model{size}{after}."
    if departs:
        said += " It departs from the paper in: " + "; ".join(_line(str(d)) for d in departs) + "."
    return said


def _use(config: Mapping[str, Any], kind: str, published: bool) -> list[str]:
    uses = [line.format("MODEL") for line in _USES.get(kind, [])] + ["vlm export MODEL --output bundle    # ONNX, runs without torch"]
    out = ["## Use", "`MODEL` is this directory.", _block("bash", uses)]
    classes = config.get("architectures")
    if published and isinstance(classes, list) and classes:
        out.append(_block("python", [f"from transformers import {classes[0]}", "", f'model = {classes[0]}.from_pretrained("MODEL")']))
    return out


def _made(run: RunRecord) -> list[str]:
    environment, stages = run.environment, run.setting("stages") or []
    versions = environment.get("versions")
    objectives = [o for o in run.setting("objectives") or [] if isinstance(o, Mapping)]
    rows = [
        ("preset", run.setting("method.key")),
        ("stages", ", ".join(str(s.get("name", "?")) for s in stages if isinstance(s, Mapping))),
        ("starts from", _start(run)),
        ("data", _data(run)),
        ("objectives", ", ".join(str(o.get("kind", o.get("name", "?"))) for o in objectives)),
        ("updates", count(run.steps) if run.steps else None),
        ("batch", run.setting("train.batch_size")),
        ("learning rate", run.setting("optimizer.lr")),
        ("seed", run.setting("train.seed", 0)),
        ("refused samples", count(run.refused) if run.refused else None),
        ("time", duration(run.seconds) if run.seconds else None),
        ("machine", ", ".join(str(environment[k]) for k in ("processor", "platform") if environment.get(k))),
        ("vlm", environment.get("vlm")),
        ("versions", ", ".join(f"{n} {v}" for n, v in versions.items()) if isinstance(versions, Mapping) else None),
    ]
    kept = [(name, value) for name, value in rows if value not in (None, "")]
    return ["## How it was made", _table(("", ""), kept)]


def _start(run: RunRecord) -> str:
    parts = run.setting("start.parts") or {}
    named = [str(run.setting("start.model"))] if run.setting("start.model") else []
    named += [f"{part} of {source if not isinstance(source, Mapping) else source.get('model', source)}" for part, source in parts.items()]
    return ", ".join(named) or "random weights"


def _data(run: RunRecord) -> str | None:
    mixture = run.setting("data.mixture") or {}
    parts = [f"{part['source']} (weight {part.get('weight', 1)})" for part in mixture.values() if isinstance(part, Mapping) and "source" in part]
    return ", ".join(parts) or run.setting("data.source")


def _measured(run: RunRecord) -> list[str]:
    if not run.results:
        return ["## Measured", "Nothing was measured."]
    rows = []
    for result in run.results:
        name, data = str(result.get("name", result["task"])), result.get("data") or {}
        on = f"{data.get('uri', 'memory')}, {result['samples']} samples"
        for metric, value, interval, chance, *_ in rows_of(result):
            rows.append((name, " ".join(metric.split()), value, interval.replace(" .. ", " to "), chance, on))
    said = "One run, one seed; intervals at 95 % are over the samples of the data alone."
    return ["## Measured", said, _table(("task", "figure", "value", "interval", "chance", "data"), rows)]


def _again(run: RunRecord) -> list[str]:
    command = run.environment.get("command")
    lines = []
    if isinstance(command, list) and command:
        lines.append(shlex.join([PurePath(str(command[0])).name, *map(str, command[1:])]))
    if run.preset_text:
        lines.append("vlm " + str(run.setting("method.command", "pretrain")) + " preset.toml --output again    # the preset below")
    if not lines:
        return []
    out = ["## Made again", _block("bash", lines)]
    if 0 < len(run.preset_text) <= MAX_PRESET:
        out += ["<details><summary>preset.toml, resolved</summary>", _block("toml", [run.preset_text.rstrip()]), "</details>"]
    return out


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows])


def _cell(value: Any) -> str:
    return _line(str(value)).replace("|", "\\|")


def _line(text: str) -> str:
    """What a preset says stays text: one line, without tags."""
    return " ".join(text.split()).replace("<", "&lt;")


def _block(language: str, lines: Sequence[str]) -> str:
    text = "\n".join(lines)
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _config(root: Path) -> dict[str, Any]:
    try:
        value = json.loads((root / "model" / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
