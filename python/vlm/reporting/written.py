"""The report of a model that writes: figures with its controls on one scale, and pictures with what it said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.evaluation.result import flatten
from vlm.evaluation.table import OVER, bounds_of, controls_of, is_own, is_percent, say
from vlm.reporting.words import count, escape, label, number

Stored = Mapping[str, Any]

WRITING = ("caption", "vqa", "grounding", "hallucination", "agreement")
CONTROLS = {"shuffled": "another picture", "none": "no picture"}
SHOWN = 10
"""Examples on the page; a result may hold more."""

_LOWER = ("nats_per_token", "bits_per_character", "absent_object_rate", "captions_with_absent", "unread", "calibration_error")
"""Figures of which less is better."""


def written_figures(result: Stored) -> str:
    """An article: each figure on its scale with interval and chance, and the controls' marks beside it."""
    task = str(result["task"])
    flat = dict(flatten(result["metrics"]))
    chance = dict(flatten(result.get("chance") or {}))
    bounds = bounds_of(result.get("intervals") or {})
    controls = controls_of(flat)
    own = [path for path in flat if is_own(path, controls)]
    rows: list[str] = []
    group = None
    for path in own:
        head, _, name = path.rpartition("/")
        if head != group and head:
            rows.append(f'<h4 class="direction">{escape(label(head))}{_asked(result, head)}</h4>')
        group = head
        beside = {c: flat[f"{c}/{path}"] for c in controls if f"{c}/{path}" in flat}
        over = {c: (flat[f"{OVER}{c}/{path}"], bounds.get(f"{OVER}{c}/{path}")) for c in beside}
        rows.append(_row(task, path, name, flat[path], bounds.get(path), chance.get(path), beside, over))
    details = result.get("details") or {}
    data = result.get("data") or {}
    about = f"{count(result.get('samples'))} pictures of <code>{escape(str(data.get('uri', 'memory')))}</code>"
    if details.get("questions"):
        about += f", {count(details['questions'])} questions"
    clusters = details.get("clusters")
    if clusters and clusters != result.get("samples"):
        about += f", intervals over {count(clusters)} concepts"
    title = str(result.get("name") or task)
    kind = "" if title == task else f" <small>{escape(task)}</small>"
    return (
        f'<article class="result"><h3>{escape(title)}{kind}</h3><p class="about">{about}</p>{"".join(rows)}'
        f"{_verdict(task, own, flat, bounds, controls)}</article>"
    )


def _asked(result: Stored, kind: str) -> str:
    details = result.get("details") or {}
    asked = (details.get("kinds") or {}).get(kind)
    if kind == "yes_no":
        asked = details.get("yes_no_questions") or details.get("probes")
    return f" <small>{count(asked)} questions</small>" if asked else ""


def _row(
    task: str,
    path: str,
    name: str,
    value: float,
    bounds: tuple[float, float] | None,
    chance: float | None,
    controls: Mapping[str, float],
    over: Mapping[str, tuple[float, tuple[float, float] | None]],
) -> str:
    reach = [value, *(bounds or ()), *controls.values(), *([] if chance is None else [chance])]
    top = 100.0 if is_percent(task, path) and max(reach) > 50 else max(reach) * 1.08 or 1.0

    def at(x: float) -> str:
        return f"{100 * min(max(x / top, 0), 1):.2f}%"

    said = f"{label(name)}: {say(task, path, value)}"
    track = ""
    extra = ""
    beside: list[str] = []
    if bounds is not None:
        low, high = bounds
        width = 100 * min(max((high - low) / top, 0), 1)
        track += f'<i class="interval" style="left:{at(low)};width:{width:.2f}%"></i>'
        said += f", 95% interval {say(task, path, low)} to {say(task, path, high)}"
        extra += f"<small>{say(task, path, low)} – {say(task, path, high)}</small>"
    if chance is not None:
        track += f'<i class="chance" style="left:{at(chance)}"></i>'
        said += f", chance {say(task, path, chance)}"
        extra += f"<small>chance {say(task, path, chance)}</small>"
    for control, level in controls.items():
        track += f'<i class="control {control}" style="left:{at(level)}"></i>'
        said += f", with {CONTROLS[control]} {say(task, path, level)}"
        beside.append(f"{CONTROLS[control]} {say(task, path, level)}{_difference(task, path, control, over)}")
    track += f'<i class="value" style="left:{at(value)}"></i>'
    return (
        f'<div class="figure"><span class="name">{escape(label(name))}</span>'
        f'<span class="track" role="img" aria-label="{escape(said)}">{track}</span>'
        f'<span class="numbers"><b>{say(task, path, value)}</b>{extra}</span>'
        f"{_small(' · '.join(beside))}</div>"
    )


def _small(text: str) -> str:
    return f'<small class="beside">{text}</small>' if text else ""


def _difference(
    task: str, path: str, control: str, over: Mapping[str, tuple[float, tuple[float, float] | None]]
) -> str:
    value, bounds = over.get(control, (0.0, None))
    if bounds is None:
        return ""
    known = " ✓" if bounds[0] > 0 or bounds[1] < 0 else ""
    return f" ({say(task, f'{OVER}{control}/{path}', value)}{known})"


def _verdict(
    task: str,
    own: list[str],
    flat: Mapping[str, float],
    bounds: Mapping[str, tuple[float, float]],
    controls: list[str],
) -> str:
    """One sentence: does it use its picture, by the first figure?"""
    if not own or not controls:
        return ""
    path = own[0]
    parts = []
    for control in controls:
        low, high = bounds.get(f"{OVER}{control}/{path}", (0.0, 0.0))
        better = high < 0 if path.rpartition("/")[2] in _LOWER else low > 0
        worse = low > 0 if path.rpartition("/")[2] in _LOWER else high < 0
        verb = "better than" if better else "worse than" if worse else "not told apart from itself"
        amount = say(task, f"{OVER}{control}/{path}", flat[f"{OVER}{control}/{path}"])
        ends = f"{say(task, f'{OVER}{control}/{path}', low)} to {say(task, f'{OVER}{control}/{path}', high)}"
        own_words = "" if not (better or worse) else " itself"
        parts.append(f"{verb}{own_words} with {CONTROLS[control]} ({amount}; {ends})")
    return f'<p class="verdict">By {escape(label(path.rpartition("/")[2]))} it is {" and ".join(parts)}.</p>'


def said_gallery(result: Stored) -> str:
    """At most ten pictures with question, answer and reference. '' when none are stored."""
    chosen = [e for e in result.get("examples") or () if e.get("direction") in (*WRITING, "localisation")][:SHOWN]
    return "".join(_example(example) for example in chosen)


def _example(example: Stored) -> str:
    truth = " / ".join(str(text) for text in example.get("truth") or ())
    picture = example.get("picture")
    if isinstance(picture, str) and picture.startswith("data:image/"):
        image = f'<img src="{escape(picture)}" alt="{escape(truth or "picture")}" loading="lazy">'
    else:
        image = '<span class="nopicture">not stored</span>'
    answer = str(example.get("answer") or "")
    shown = escape(answer) if answer else '<em class="soft">nothing</em>'
    rows = [f'<dt>said</dt><dd class="{_side(example)}">{shown}</dd>']
    rows.append(f"<dt>{_reference(example)}</dt><dd>{escape(truth)}</dd>")
    if example.get("absent"):
        rows.append(f"<dt>not there</dt><dd>{escape(', '.join(map(str, example['absent'])))}</dd>")
    for control, text in (example.get("controls") or {}).items():
        rows.append(f'<dt>{escape(CONTROLS.get(control, control))}</dt><dd class="soft">{escape(str(text)) or "nothing"}</dd>')
    return (
        f'<article class="example sideways asked">{image}<div><header><q>{escape(str(example.get("question", "")))}</q>'
        f'{_mark(example)}</header><dl class="spoken">{"".join(rows)}</dl></div></article>'
    )


def _reference(example: Stored) -> str:
    return "shows" if example.get("direction") == "hallucination" else "reference"


def _side(example: Stored) -> str:
    if example.get("right"):
        return "said right"
    return "said" if example.get("direction") == "caption" else "said wrong"


def _mark(example: Stored) -> str:
    direction, right = example.get("direction"), bool(example.get("right"))
    if direction == "caption":
        score = f"CIDEr {number(float(example.get('cider', 0.0)))}"
        half = str(example.get("half", ""))
        if right:
            return f'<span class="mark good">✓ word for word · {score}</span>'
        return f'<span class="mark {"near" if half == "better" else "miss"}">{escape(half)} half · {score}</span>'
    if direction == "hallucination":
        return (
            '<span class="mark good">✓ nothing absent named</span>'
            if right
            else '<span class="mark miss">✗ names what is not there</span>'
        )
    return '<span class="mark good">✓ right</span>' if right else '<span class="mark miss">✗ wrong</span>'


def cost_figures(result: Stored) -> str:
    """An article of plain numbers: what was counted, and what was measured on this machine."""
    metrics = result["metrics"]
    bounds = bounds_of(result.get("intervals") or {})
    parts = []
    for head, intro in (("counted", "from shapes"), ("measured", "on this machine, one row at a time")):
        rows = []
        for name, value in (metrics.get(head) or {}).items():
            ends = bounds.get(f"{head}/{name}")
            between = f" <small>{_amount(name, ends[0])} to {_amount(name, ends[1])}</small>" if ends else ""
            rows.append(f"<dt>{escape(label(name))}</dt><dd>{_amount(name, float(value))}{between}</dd>")
        if rows:
            parts.append(f'<h4 class="direction">{head} <small>{intro}</small></h4><dl class="facts">{"".join(rows)}</dl>')
    layers = (result.get("details") or {}).get("positions_by_layer") or []
    if layers:
        most = max(layers) or 1
        bars = "".join(f'<i style="height:{100 * v / most:.1f}%"></i>' for v in layers)
        said = ", ".join(f"{v:g}" for v in layers)
        parts.append(
            f'<h4 class="direction">positions that each layer reads</h4><div class="layers" role="img" aria-label="{said}">{bars}</div>'
            f'<p class="about">{layers[0]:g} in the first layer, {layers[-1]:g} in the last</p>'
        )
    title = str(result.get("name") or "cost")
    about = f"{count(result.get('samples'))} prompts with one picture each"
    return f'<article class="result"><h3>{escape(title)}</h3><p class="about">{about}</p>{"".join(parts)}</article>'


def _amount(name: str, value: float) -> str:
    if name.endswith("bytes"):
        return f"{value / 2**20:,.2f} MiB" if value >= 2**20 else f"{value / 2**10:,.1f} KiB"
    if name.endswith("time_to_first_token"):
        return f"{number(1000 * value)} ms"
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= size:
            return f"{value / size:.3g} {word}"
    return number(value)
