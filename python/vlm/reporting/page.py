"""The page: sections in the order a reader asks. What is it, how good is it, how did it learn, what does it do?"""

from __future__ import annotations

from pathlib import Path

from vlm import __version__
from vlm.config.errors import RequestError
from vlm.evaluation.result import flatten, write_text
from vlm.evaluation.table import bounds_of, is_percent, say
from vlm.reporting.commands import command, next_steps, quoted, task_of
from vlm.reporting.curves import learning
from vlm.reporting.document import document
from vlm.reporting.examples import answers, finds, mixes, says, surprises
from vlm.reporting.findings import figures
from vlm.reporting.making import made
from vlm.reporting.record import RunRecord, read_run
from vlm.reporting.words import count, duration, escape, label
from vlm.reporting.written import CONTROLS


def write_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a run, `RUN/report.html` by default, and return its path.

    Raises DataError when the directory is no run, RequestError for an output that is a directory; whatever else is missing is
    said on the page.
    """
    path = Path(output) if output is not None else Path(run) / "report.html"
    if path.is_dir():
        raise RequestError("is a directory, expected a file to write", where=str(path), remedy=f"for example {path / 'report.html'}")
    write_text(path, render(read_run(run)))
    return path


def render(run: RunRecord) -> str:
    """The whole page as one string of HTML that loads nothing."""
    sections = [
        ("results", "How good it is", _results),
        ("learning", "How it learned", learning),
        ("says", "What it says", says),
        ("finds", "What it finds", finds),
        ("answers", "What it answers", answers),
        ("mixes", "What it mixes up", mixes),
        ("surprise", "What surprises it", surprises),
        ("made", "What was trained", made),
        ("next", "What to do next", next_steps),
    ]
    filled = [(name, title, body) for name, title, make in sections if (body := make(run))]
    links = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title, _ in filled)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>{text}</section>'
        for name, title, text in filled
    )
    key = str(run.setting("method.key", "")) or "run"
    return document(
        run.title,
        f'<header class="top"><p class="kicker">{escape(key)} · {escape(run.root.name)}</p><h1>{escape(run.title)}</h1>'
        f'<p class="lead">{_lead(run)}</p>{_headline(run)}{_notice(run)}'
        f'<nav aria-label="sections"><ul>{links}</ul></nav></header><main>{body}</main>'
        f"<footer>Written by vlm {escape(__version__)}. The pictures on this page are the run's own data: it stays with the run."
        "</footer>",
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
        "localisation": ("accuracy",),
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
            + command(f"vlm evaluate {quoted(run)} --task {task_of(run)} --save")
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
