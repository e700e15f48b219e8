"""How it learned: curves over the updates of the run."""

from __future__ import annotations

from vlm.evaluation.table import OVER
from vlm.reporting.charts import Line, line_chart, smooth
from vlm.reporting.record import RunRecord
from vlm.reporting.words import label


def learning(run: RunRecord) -> str:
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
