"""Score against speed over the values of settings of a trained model's token reduction."""

from __future__ import annotations

import re
import statistics
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config.errors import RequestError
from vlm.config.writing import toml_value
from vlm.evaluation.encoder import of_memory
from vlm.evaluation.reading import EvaluationData
from vlm.evaluation.result import flatten, write_json, write_text
from vlm.evaluation.session import Session
from vlm.evaluation.table import number
from vlm.reporting.document import document
from vlm.reporting.trade_chart import Point, Trade, trade_chart
from vlm.reporting.words import escape, label
from vlm.workflows.token_search.changed import with_settings
from vlm.workflows.token_search.run import figure

Note = Callable[[str], None]


@dataclass(frozen=True)
class Curve:
    """One setting of the model and the values it takes in turn; `name` is what a reader sees."""

    name: str
    path: str
    values: Sequence[Any]


def read_curve(text: str) -> Curve:
    """`PATH=V,V,...` or `NAME: PATH=V,V,...`; the values as TOML writes them. Raises RequestError."""
    head, separator, listed = text.partition("=")
    name, colon, path = head.rpartition(": ")
    if not separator or not path.strip():
        raise RequestError("--vary is PATH=V,V,...: tokens.keep.ratio=1.0,0.5,0.25")
    try:
        values = tomllib.loads(f"values = [{listed}]")["values"]
    except tomllib.TOMLDecodeError as error:
        raise RequestError(f"--vary: {listed!r} is no list of values: {error}") from error
    return Curve(name.strip() if colon else path.strip(), path.strip(), values)


def run_sweep(
    model: Any,
    tokenizer: Any,
    curves: Sequence[Curve],
    data: EvaluationData,
    task: Any,
    metric: str,
    *,
    batch: int = 16,
    repeats: int = 5,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """One row a value of a curve: score with its interval, pictures a second, and both against the first row.

    Speed is from prepared pictures to embeddings, or to the first token of an answer about each: the arms of all curves
    take turns in every repeat and the median counts. Raises RequestError for fewer than two values and for two curves of one name.
    """
    if sum(len(curve.values) for curve in curves) < 2:
        raise RequestError("a sweep needs two values at least")
    if len({curve.name for curve in curves}) < len(curves):
        raise RequestError("two curves have one name", remedy="name them: --vary 'NAME: PATH=V,V,...'")
    rows: list[dict[str, Any]] = []
    runs: list[Callable[[], None]] = []
    count = 0
    for curve in curves:
        for value in curve.values:
            made = with_settings(model, {curve.path: value})
            view = of_memory(made, tokenizer, made.preprocess(), batch=batch)
            result = Session(view, data, batch=batch).run(task)
            run, count = _work(view, data, batch)
            runs.append(run)
            ends = dict(flatten(result.intervals))
            score = figure(result, metric)
            rows.append({"curve": curve.name, "setting": curve.path, "value": value, "score": score, "samples": result.samples})
            rows[-1] |= {end: ends.get(f"{metric}/{end}", score) for end in ("lower", "upper")}
            note(f"{curve.name} = {value_text(value)}: {metric} {score:.4g}")
    seconds: list[list[float]] = [[] for _ in runs]
    for run in runs:  # once unmeasured
        run()
    for _ in range(repeats):
        for times, run in zip(seconds, runs):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
    first = statistics.median(seconds[0])
    for row, times in zip(rows, seconds):
        middle = statistics.median(times)
        row |= {
            "seconds": round(middle, 6),
            "pictures_per_second": round(count / middle, 3),
            "speed_ratio": round(first / middle, 4),
            "score_difference": round(row["score"] - rows[0]["score"], 4),
        }
    return {"task": task.task, "metric": metric, "data": data.uri, "batch": count, "repeats": repeats, "rows": rows}


def value_text(value: Any) -> str:
    """A value as the command line takes it, on one line: `none`, `0.5`, `{remove = {r = 8}}`."""
    return value if isinstance(value, str) else re.sub(r"\s*\n\s*", " ", toml_value(value)).replace(", ]", " ]")


def _work(view: Any, data: EvaluationData, batch: int) -> tuple[Callable[[], None], int]:
    """(what is timed, number of pictures in it)."""
    places = data.chosen(batch, 0)
    prepared = [view.prepare_image(data.picture(place)) for place in places]
    if hasattr(view, "encode_pixels"):
        return lambda: _done(view.encode_pixels(prepared)), len(prepared)
    from vlm.runtime.chat import Message

    prompts = [view.prompt([Message("user", ("Describe the picture.",))], [picture]) for picture in prepared]
    return lambda: _done(view.stepper().start(prompts)), len(prompts)


def _done(numbers: np.ndarray) -> None:
    if not np.isfinite(numbers).all():
        raise RequestError("the model gives numbers that are not finite")


def write_sweep(report: dict[str, Any], output: Path) -> list[Path]:
    """`sweep.json`, `sweep.svg` (score over speed, a line a curve) and `sweep.html`, a page with the figure and the table."""
    rows = report["rows"]
    trades = []
    for name in dict.fromkeys(row["curve"] for row in rows):
        own = [row for row in rows if row["curve"] == name]
        points = [Point(row["speed_ratio"], row["score"], row["lower"], row["upper"], value_text(row["value"])) for row in own]
        trades.append(Trade(name, points))
    figure_name = ", ".join(map(label, report["metric"].split("/")))
    title = f"{label(report['task'])}: {figure_name} against speed"
    chart = trade_chart(title, trades, across="speed, times that of the first arm", up=figure_name)
    names = ("curve", "value", "score", "lower", "upper", "score_difference", "pictures_per_second", "speed_ratio")
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)

    def cell(row: dict[str, Any], name: str) -> str:
        value = row[name]
        return escape(value_text(value) if name == "value" else number(value) if isinstance(value, float) else str(value))

    body = "".join("<tr>" + "".join(f"<td>{cell(row, name)}</td>" for name in names) + "</tr>" for row in rows)
    page = document(
        title,
        f"<main><h1>{escape(title)}</h1><p>{escape(report['task'])} on {escape(report['data'])}, {rows[0]['samples']} samples, bars: 95 %. "
        f"Speed: {report['batch']} pictures at once, median of {report['repeats']} turns.</p>"
        f'<figure>{chart}</figure><div class="scroll"><table><tr>{head}</tr>{body}</table></div></main>',
    )
    write_json(output / "sweep.json", report)
    write_text(output / "sweep.svg", chart)
    write_text(output / "sweep.html", page)
    return [output / "sweep.json", output / "sweep.svg", output / "sweep.html"]
