"""The page: sections in the order a reader asks. What is it, how good is it, how did it learn, what does it do?"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm import __version__
from vlm.evaluation.result import flatten, write_text
from vlm.evaluation.table import OVER, bounds_of, is_percent, say
from vlm.reporting.charts import Line, line_chart, smooth
from vlm.reporting.findings import confusion, figures, gallery, surprise
from vlm.reporting.record import RunRecord, read_run
from vlm.reporting.words import count, duration, escape, label
from vlm.reporting.written import CONTROLS, said_gallery

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, `RUN/report.html` by default, and return its path.

    Raises DataError when the directory is no run; whatever else is missing is said on the page.
    """
    path = Path(output) if output is not None else Path(run) / "report.html"
    write_text(path, render(read_run(run)))
    return path


def render(run: RunRecord) -> str:
    """The whole page as one string of HTML that loads nothing."""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    sections = [
        ("results", "How good it is", _results),
        ("learning", "How it learned", _learning),
        ("says", "What it says", _says),
        ("finds", "What it finds", _finds),
        ("answers", "What it answers", _answers),
        ("mixes", "What it mixes up", _mixes),
        ("surprise", "What surprises it", _surprise),
        ("made", "What was trained", _made),
        ("next", "What to do next", _next),
    ]
    filled = [(name, title, body) for name, title, make in sections if (body := make(run))]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in filled)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{text}</section>'
        for name, title, text in filled
    )
    key = str(run.setting("method.key", "")) or "run"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(run.title)}</title><style>{style}</style></head><body>"
        f'<header class="top"><p class="kicker">{escape(key)} · {escape(run.root.name)}</p><h1>{escape(run.title)}</h1>'
        f'<p class="lead">{_lead(run)}</p>{_headline(run)}{_notice(run)}'
        f'<nav aria-label="sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        f"<footer>Written by vlm {escape(__version__)}. The pictures on this page are the run's own data: it stays with the run."
        "</footer></body></html>\n"
    )


def _lead(run: RunRecord) -> str:
    kind = f"{run.setting('model.kind', '')} model".strip()
    size = f" of {count(run.parameters)} parameters" if run.parameters else ""
    data = run.setting("data.source")
    on = f" on <code>{escape(str(data))}</code>" if data else ""
    batch = run.setting("train.batch_size")
    each = f" of {count(batch)} samples each" if isinstance(batch, int) else ""
    took = f", in {duration(run.seconds)}" if run.seconds else ""
    verb = "trained" if run.finished else "is being trained"
    article = "An" if kind[:1] in "aeiou" else "A"
    return f"{article} {escape(kind)}{size}, {verb}{on} for {count(run.steps)} updates{each}{took}."


def _headline(run: RunRecord) -> str:
    """At most four figures: the ones a reader looks for first."""
    wanted = {
        "retrieval": ("image_to_text/r@1", "text_to_image/r@1"),
        "zero-shot": ("top1",),
        "linear-probe": ("top1",),
        "text-probe": ("top1",),
        "classification": ("top1",),
        "perplexity": ("bits_per_character", "perplexity"),
        "vqa": ("exact",),
        "grounding": ("accuracy", "mean_iou"),
        "caption": ("cider",),
        "hallucination": ("absent_object_rate", "yes_no/f1"),
        "cost": ("measured/tokens_per_second",),
    }
    cells = []
    for result in run.results:
        flat = dict(flatten(result["metrics"]))
        chance = dict(flatten(result.get("chance") or {}))
        bounds = bounds_of(result.get("intervals") or {})
        task = str(result["task"])
        for path in wanted.get(result["task"], ()):
            if path not in flat:
                continue
            head, _, name = path.rpartition("/")
            title = (
                f"{label(head)}, {label(name)}"
                if head
                else f"{result.get('name', result['task'])}, {label(name)}"
            )
            ends = " to ".join(say(task, path, end) for end in bounds[path]) if path in bounds else ""
            levels = [f"chance {say(task, path, chance[path])}"] if path in chance else []
            if f"none/{path}" in flat:
                levels.append(f"no picture {say(task, path, flat[f'none/{path}'])}")
            unit = "<sup>%</sup>" if is_percent(task, path) else ""
            below = ", ".join([ends] * bool(ends) + levels)
            cells.append(
                f'<div><dt>{escape(title)}</dt><dd><span class="big">{say(task, path, flat[path])}{unit}</span>'
                + (f"<br><small>{below}</small></dd></div>" if below else "</dd></div>")
            )
    return f'<dl class="headline">{"".join(cells[:4])}</dl>' if cells else ""


def _notice(run: RunRecord) -> str:
    said = list(run.missing)
    if run.refused:
        said.append(f"{count(run.refused)} samples were refused in training; quarantine.jsonl names them")
    if not said:
        return ""
    return f'<div class="notice" role="note">Worth knowing:<ul>{"".join(f"<li>{escape(text)}</li>" for text in said)}</ul></div>'


def _results(run: RunRecord) -> str:
    if not run.results:
        return (
            '<p class="intro">No evaluation is stored in this run yet. This measures one and keeps it for the next report:</p>'
            + _command(f"vlm evaluate {_quoted(run)} --task {_task(run)} --save")
        )
    key = (
        '<ul class="key"><li><span class="track"><i class="value" style="left:50%"></i></span>measured</li>'
        '<li><span class="track"><i class="interval" style="left:10%;width:80%"></i></span>95% interval</li>'
        '<li><span class="track"><i class="chance" style="left:50%"></i></span>chance: what guessing reaches</li>'
    )
    if any(name in result["metrics"] for result in run.results for name in CONTROLS):
        key += (
            '<li><span class="track"><i class="control shuffled" style="left:50%"></i></span>with another picture</li>'
            '<li><span class="track"><i class="control none" style="left:50%"></i></span>without a picture</li>'
            "<li>in brackets the gain over it, ✓ where its interval leaves out 0</li>"
        )
    key += "</ul>"
    said = "The intervals come from drawing the samples again with replacement"
    intro = f'<p class="intro">{said}, whole concepts at a time where several pictures share one.</p>'
    return f'{intro}<div class="results">{figures(run.results)}</div>{key}'


def _learning(run: RunRecord) -> str:
    series = run.series
    charts = []
    for name in sorted(n for n in series if n.startswith("train/") and "/lr" not in n and n != "train/loss"):
        if len(series[name]) > 1 and not name.endswith(("steps", "samples", "tokens")):
            charts.append(
                line_chart(label(name.removeprefix("train/").replace("/", ", ")), _curve(series[name]))
            )
    if "train/loss" in series:
        charts.insert(0, line_chart("loss", _curve(series["train/loss"])))
    for task in sorted({n.split("/")[1] for n in series if n.startswith("eval/") and len(series[n]) > 1}):
        names = [n for n in series if n.startswith(f"eval/{task}/") and len(series[n]) > 1]
        names = [n for n in names if f"/{OVER}" not in n]  # the figures and their controls say it
        names = [n for n in names if n.endswith(("r@1", "top1", "bits_per_character", "/exact", "/cider"))] or names[:4]
        names.sort(key=lambda n: n.count("/"))
        lines = [Line(" ".join(label(p) for p in n.split("/")[2:]), series[n]) for n in names[:5]]
        charts.append(line_chart(f"{label(task)} while training", lines))
    rates = sorted(n for n in series if n.startswith("train/lr"))
    if rates:
        lines = [Line(n.removeprefix("train/lr").strip("/") or "learning rate", series[n]) for n in rates[:5]]
        charts.append(line_chart("learning rate", lines, zero=True))
    if "scale/logit" in series:
        charts.append(line_chart("similarity scale", [Line("scale", series["scale/logit"])]))
    for name, unit in (("perf/samples_per_s", "samples/s"), ("perf/tokens_per_s", "tokens/s")):
        if name in series:
            charts.append(line_chart("throughput", _curve(series[name]), unit=unit, zero=True))
    body = "".join(charts)
    if not body:
        return '<p class="intro">No curves: metrics.jsonl holds none.</p>'
    intro = '<p class="intro">Over the updates of the run. Thin lines are the values as logged, thick ones their moving average.</p>'
    return f'{intro}<div class="charts">{body}</div>'


def _curve(points: list[tuple[float, float]]) -> list[Line]:
    if len(points) < 30:
        return [Line("value", points)]
    return [Line("as logged", points, faint=True), Line("average", smooth(points))]


_SAYS = {
    "vqa": "Questions about the evaluated pictures: as many wrong answers as right ones, where there are so many.",
    "grounding": "Objects asked for in the evaluated pictures: as many wrong boxes as right ones, where there are so many.",
    "caption": "Captions of the evaluated pictures: in turns from the worse and the better half by CIDEr.",
    "hallucination": "Captions of the evaluated pictures: in turns with and without an object that is not there.",
}
"""How the examples of each task were chosen, which is not by success."""


def _says(run: RunRecord) -> str:
    parts = []
    for result in run.results:
        task = str(result["task"])
        if task in _SAYS and (drawn := said_gallery(result)):
            name = str(result.get("name") or task)
            parts.append(f'<h3>{escape(label(name))}</h3><p class="soft">{_SAYS[task]}</p><div class="examples">{drawn}</div>')
    if not parts:
        return ""
    intro = (
        "Within each side they are the first ones of a random draw fixed by a seed: how often it is right is said by "
        "the figures above, not by this mixture."
    )
    return f'<p class="intro">{intro}</p>{"".join(parts)}'


def _finds(run: RunRecord) -> str:
    out = []
    for result in run.results:
        if result["task"] != "retrieval":
            continue
        for direction, text in (
            (
                "text_to_image",
                "A caption, and the five pictures it lies nearest to. A ring marks a right one.",
            ),
            ("image_to_text", "A picture, and the five captions it lies nearest to, by cosine."),
        ):
            drawn = gallery(result, direction)
            if drawn:
                out.append(
                    f'<h3>{label(direction)}</h3><p class="soft">{text}</p><div class="examples">{drawn}</div>'
                )
    if not out:
        if _task(run) != "retrieval":
            return ""
        return '<p class="intro">No examples are stored. This draws some:</p>' + _command(
            f"vlm evaluate {_quoted(run)} --task retrieval --save"
        )
    said = "These are the first ones of a random draw fixed beforehand by a seed, successes and failures as they came."
    return f'<p class="intro">{said}</p>{"".join(out)}'


def _each(run: RunRecord, task: str, draw: Callable[[dict[str, Any]], str], intro: str) -> str:
    parts = []
    for result in run.results:
        if result["task"] == task and (drawn := draw(result)):
            name = str(result.get("name", task))
            parts.append(f"<h3>{escape(name)}</h3>{drawn}" if name != task else drawn)
    return f'<p class="intro">{intro}</p>{"".join(parts)}' if parts else ""


def _answers(run: RunRecord) -> str:
    def draw(result: dict[str, Any]) -> str:
        drawn = gallery(result, "zero-shot")
        return f'<div class="examples">{drawn}</div>' if drawn else ""

    return _each(
        run,
        "zero-shot",
        draw,
        "Pictures and the five class names they lie nearest to, by cosine; again as the seed drew them.",
    )


def _mixes(run: RunRecord) -> str:
    return _each(
        run,
        "zero-shot",
        confusion,
        "Zero-shot answers by true class. The darker a cell off the diagonal, the more often that mistake is made.",
    )


def _surprise(run: RunRecord) -> str:
    def draw(result: dict[str, Any]) -> str:
        drawn = surprise(result)
        return f'<div class="examples">{drawn}</div>' if drawn else ""

    return _each(
        run,
        "perplexity",
        draw,
        "Documents of the evaluated data, each token shaded by the bits it cost: dark is a surprise.",
    )


def _facts(rows: list[tuple[str, Any]]) -> str:
    kept = [(name, value) for name, value in rows if value not in (None, "", {}, [])]
    return (
        '<dl class="facts">'
        + "".join(f"<dt>{escape(n)}</dt><dd>{escape(str(v))}</dd>" for n, v in kept)
        + "</dl>"
    )


def _made(run: RunRecord) -> str:
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


def _quoted(run: RunRecord) -> str:
    return shlex.quote(str(run.root))


def _task(run: RunRecord) -> str:
    """The task that fits the run's model."""
    return {"language": "perplexity", "vision-language": "vqa"}.get(str(run.setting("model.kind")), "retrieval")


def _command(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def _next(run: RunRecord) -> str:
    root = _quoted(run)
    steps = []
    if not run.finished:
        steps.append(
            ("Go on where it stopped.", f"vlm {run.setting('method.command', 'pretrain')} --resume {root}")
        )
    elif _task(run) == "vqa":
        steps += [
            ("Ask it about other pictures.", f"vlm evaluate {root} --task vqa --data questions.jsonl --save"),
            ("See what an answer costs.", f"vlm evaluate {root} --task cost --save"),
            ("Write an ONNX bundle that runs without torch.", f"vlm export {root} --output bundle"),
        ]
    elif _task(run) == "perplexity":
        steps += [
            ("Measure it on other text.", f"vlm evaluate {root} --task perplexity --data texts.jsonl.gz"),
            ("Write an ONNX bundle that runs without torch.", f"vlm export {root} --output bundle"),
        ]
    else:
        steps += [
            (
                "Classify a picture of yours by names that you choose.",
                f'vlm predict {root} photo.jpg --labels "a cat,a dog,a bicycle"',
            ),
            (
                "Search your own pictures by text.",
                f"find photos -name '*.jpg' | vlm embed {root} --images - > photos.jsonl\n"
                f"vlm search {root} \"a red bicycle\" --index photos.jsonl",
            ),
            (
                "Measure it on other data.",
                f"vlm evaluate {root} --task zero-shot --data pictures/ --labels-from label --save",
            ),
            (
                "Write an ONNX bundle that runs without torch, and serve it.",
                f"vlm export {root} --output bundle\nvlm serve bundle",
            ),
        ]
    key = run.setting("method.key")
    if key:
        steps.append(
            (
                "Change one thing and compare.",
                f"vlm presets show {shlex.quote(str(key))} --resolved\nvlm runs compare {root} runs/other",
            )
        )
    return (
        '<ol class="next">'
        + "".join(f"<li><p>{escape(text)}</p>{_command(command)}</li>" for text, command in steps)
        + "</ol>"
    )
