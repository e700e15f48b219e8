"""Score against speed over the values of one setting of a trained model's token reduction."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config.errors import RequestError
from vlm.evaluation.encoder import of_memory
from vlm.evaluation.reading import EvaluationData
from vlm.evaluation.result import write_json, write_text
from vlm.evaluation.session import Session
from vlm.reporting.charts import Line, line_chart
from vlm.reporting.words import escape
from vlm.workflows.token_search.changed import with_settings
from vlm.workflows.token_search.run import figure

Note = Callable[[str], None]


def run_sweep(
    model: Any,
    tokenizer: Any,
    path: str,
    values: Sequence[Any],
    data: EvaluationData,
    task: Any,
    metric: str,
    *,
    batch: int = 16,
    repeats: int = 5,
    note: Note = lambda text: None,
) -> dict[str, Any]:
    """One row a value of the setting `path`: score, pictures a second, and both against the first of the values.

    Speed is from prepared pictures to embeddings, or to the first token of an answer about each: the arms take turns in
    every repeat and the median counts. Raises RequestError for fewer than two values.
    """
    if len(values) < 2:
        raise RequestError("a sweep needs two values at least")
    rows: list[dict[str, Any]] = []
    runs: list[Callable[[], None]] = []
    count = 0
    for value in values:
        made = with_settings(model, {path: value})
        view = of_memory(made, tokenizer, made.preprocess(), batch=batch)
        session = Session(view, data, batch=batch)
        result = session.run(task)
        run, count = _work(view, data, batch)
        runs.append(run)
        rows.append({"value": value, "score": figure(result, metric), "samples": result.samples})
        note(f"{path} = {value}: {metric} {rows[-1]['score']:.4g}")
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
    return {"setting": path, "task": task.task, "metric": metric, "data": data.uri, "batch": count, "repeats": repeats, "rows": rows}


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
    """`sweep.json` and `sweep.html`, a page with the two curves and the table."""
    style = Path(line_chart.__code__.co_filename).with_name("page.css").read_text(encoding="utf-8")
    rows = report["rows"]
    numeric = all(isinstance(row["value"], int | float) for row in rows)
    place = (lambda i, row: float(row["value"])) if numeric else (lambda i, row: float(i))
    charts = []
    figures = {report["metric"]: "score", "pictures a second": "pictures_per_second", "speed against the first": "speed_ratio"}
    for title, key in figures.items():
        points = sorted((place(i, row), float(row[key])) for i, row in enumerate(rows))
        charts.append(line_chart(title, [Line(title, points)], axis=report["setting"]))
    names = ("value", "score", "score_difference", "pictures_per_second", "speed_ratio")
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(row[name]))}</td>" for name in names) + "</tr>" for row in rows)
    title = f"{report['metric']} and speed over {report['setting']}"
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{style}</style></head>'
        f"<body><main><h1>{escape(title)}</h1><p>{escape(report['task'])} on {escape(report['data'])}; {report['batch']} pictures at once, "
        f"median of {report['repeats']} turns.</p>{''.join(charts)}<table><tr>{head}</tr>{body}</table></main></body></html>"
    )
    write_json(output / "sweep.json", report)
    write_text(output / "sweep.html", page)
    return [output / "sweep.json", output / "sweep.html"]
