"""`vlm tokens`: how many visual tokens a trained model needs, and what fewer of them cost and save."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm.cli.output import echo_json, echo_result, log
from vlm.config.errors import RequestError

if TYPE_CHECKING:
    from vlm.evaluation.reading import EvaluationData

_SEARCH = """\b
Examples:
  vlm tokens search runs/vlm --output runs/keep
  vlm tokens search runs/vlm --kind sigmoid --budget 0.4 --like runs/keep --output runs/curve
  vlm evaluate runs/keep/model --task vqa --data 'scenes:?n=400&split=test'
"""
_SWEEP = """\b
Examples:
  vlm tokens sweep runs/aim --vary tokens.pre.0.select.keep=1.0,0.75,0.5,0.25,0.125 --output sweep
  vlm tokens sweep runs/tome --vary vision.merge.remove.r=0,4,8,12,15 --task retrieval --metric image_to_text/r@10 --output sweep
  vlm tokens sweep runs/vlm --vary 'all: tokens.keep={kind="constant",ratio=1.0}' \\
    --vary 'pooled: tokens={pre=[{select={kind="pool",stride=2}}]}' --task captions --metric cider --output sweep
"""


@click.group()
def group() -> None:
    """Search how many visual tokens each layer of a model needs, and measure score against speed."""


def _common(command: Any) -> Any:
    options = (
        click.option("--data", metavar="URI", help="calibration data, never the test split [default: the run's data.val]"),
        click.option("--task", default="vqa", show_default=True, help="evaluation task that gives the score, by its name in the run, or its kind"),
        click.option("--metric", default="exact", show_default=True, help="figure of the task; higher is better"),
        click.option("--limit", type=click.IntRange(min=1), default=200, show_default=True, help="samples that every arm is scored on"),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="of the draw of samples"),
        click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all cores]"),
        click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="rows of one forward pass"),
        click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="directory of what is found"),
        click.option("--json", "as_json", is_flag=True, help="print the report as one JSON object"),
    )
    for option in reversed(options):
        command = option(command)
    return command


@group.command(epilog=_SEARCH)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--kind", type=click.Choice(("greedy", "sigmoid")), default="greedy", show_default=True, help="layer by layer, or a curve")
@click.option("--inner", type=click.Choice(("bisect", "bayes")), help="greedy: how one layer's count is found [default: bisect]")
@click.option("--tolerance", type=click.FloatRange(min=0), help="greedy: score that may be lost in all [default: 0.5]")
@click.option("--group", "grouped", type=click.IntRange(min=1), help="greedy: layers that share a count [default: 1]")
@click.option("--budget", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="sigmoid: mean share over all layers")
@click.option("--evaluations", type=click.IntRange(min=2), help="sigmoid: measurements; greedy with bayes: of one count")
@click.option(
    "--like", type=click.Path(path_type=Path, exists=True), metavar="DIR", help="sigmoid: a greedy search whose table the first curve fits"
)
@_common
def search(model: Path, output: Path, as_json: bool, **given: Any) -> None:
    """Find how many visual tokens each layer of MODEL needs; the model itself is not trained.

    Writes keep.toml, a table for a preset, and model/, MODEL with that table. An interrupted search goes on where it
    ended: call it again.
    """
    import pydantic

    from vlm.evaluation.encoder import open_model
    from vlm.evaluation.generator import TorchGenerator
    from vlm.workflows.token_search.run import run_search
    from vlm.workflows.token_search.search import SearchOptions

    table = {
        "kind": given["kind"],
        "inner": given["inner"],
        "tolerance": given["tolerance"],
        "group": given["grouped"],
        "budget": given["budget"],
        "evaluations": given["evaluations"],
    }
    try:
        options = pydantic.TypeAdapter[Any](SearchOptions).validate_python({k: v for k, v in table.items() if v is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][-1])
        if first["type"] == "missing":
            raise RequestError(f"--kind {given['kind']} needs --{name}") from error
        raise RequestError(f"--{name} does not go with --kind {given['kind']}") from error
    data = _data(model, given)
    like = None
    if given["like"] is not None:
        like = tuple(json.loads((given["like"] / "search.json").read_text(encoding="utf-8"))["table"])
    opened = open_model(model, threads=given["threads"], batch=given["batch"])
    if not isinstance(opened, TorchGenerator):
        raise RequestError("a search needs a model that reads pictures and writes, as a run or model directory", where=str(model))
    report = run_search(
        opened, data, task_of(model, given), given["metric"], options, output, like=like, batch=given["batch"], note=log
    )
    if as_json:
        echo_json(report)
        return
    lost = report["score"] - report["full_score"]
    echo_result(
        f"layers read {' '.join(map(str, report['table']))} of {report['tokens']} visual tokens: {report['mean_share']:.0%} on average\n"
        f"{report['metric']} {report['score']:.2f}, with all {report['full_score']:.2f} ({lost:+.2f}), "
        f"{report['tables_scored']} tables scored\n{output / 'keep.toml'}, {output / 'model'}"
    )


@group.command(epilog=_SWEEP)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--vary", required=True, multiple=True, metavar="[NAME: ]PATH=V,V,...",
    help="a setting of the model and its values; several give a line each, and all are compared with the very first value",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="turns in which every arm is timed once")
@_common
def sweep(model: Path, output: Path, as_json: bool, **given: Any) -> None:
    """Score and speed of MODEL over the values of settings of its token reduction.

    Writes sweep.json, sweep.svg (score against speed) and sweep.html, a page with both. The arms take turns, so a
    machine under load slows all.
    """
    from vlm.data.tokenizer import Tokenizer
    from vlm.models.directory import find_model_directory, load_model
    from vlm.workflows.token_search.sweep import read_curve, run_sweep, value_text, write_sweep

    curves = [read_curve(text) for text in given["vary"]]
    data, directory = _data(model, given), find_model_directory(model)
    if given["threads"] is not None:
        import torch

        torch.set_num_threads(given["threads"])
    report = run_sweep(
        load_model(directory), Tokenizer.load(directory), curves, data, task_of(model, given), given["metric"],
        batch=given["batch"], repeats=given["repeats"], note=log,
    )  # fmt: skip
    written = write_sweep(report, output)
    if as_json:
        echo_json(report)
        return
    arms = [f"{row['curve']} = {value_text(row['value'])}" for row in report["rows"]]
    wide = max(map(len, arms))
    lines = [f"{'':{wide}}  {given['metric']:>12}  {'interval':>16}  pictures/s  speed"]
    for arm, row in zip(arms, report["rows"]):
        interval = f"[{row['lower']:.2f}, {row['upper']:.2f}]"
        lines.append(f"{arm:{wide}}  {row['score']:12.2f}  {interval:>16}  {row['pictures_per_second']:10.1f}  {row['speed_ratio']:.2f}")
    echo_result("\n".join([*lines, *map(str, written)]))


def task_of(model: Path, given: dict[str, Any]) -> Any:
    """The task as the run is evaluated by it (its prompt, its columns), else as it comes; without controls, which nobody reads
    here. Raises RequestError for one that there is not."""
    import pydantic

    from vlm.evaluation import TaskOptions

    own = {}
    for table in _preset(model).get("evaluation", {}).get("tasks", []):
        if given["task"] in (table.get("name"), table["task"]):
            own = {key: value for key, value in table.items() if key not in ("data", "controls", "examples")}
            break
    values = {"task": given["task"]} | own | {"limit": given["limit"], "seed": given["seed"], "resamples": 1000}
    adapter = pydantic.TypeAdapter[Any](TaskOptions)
    try:
        task = adapter.validate_python(values)
    except pydantic.ValidationError as error:
        raise RequestError(f"--task {given['task']}: {error.errors()[0]['msg']}") from error
    return task.model_copy(update={"controls": ()}) if "controls" in type(task).model_fields else task


def _preset(model: Path) -> dict[str, Any]:
    """The preset of a run, resolved; {} for a model directory."""
    file = model / "preset.toml"
    return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _data(model: Path, given: dict[str, Any]) -> EvaluationData:
    """Calibration data: as given, else what the run validates on; never what its claim is tested on."""
    from vlm.evaluation.reading import Reading
    from vlm.workflows.token_search.run import calibration

    preset = _preset(model)
    table = preset.get("data", {})
    uri = given["data"] or table.get("val")
    if not isinstance(uri, str):
        raise RequestError("no data to score on", remedy="give --data URI")
    reading = Reading.of_table(table) if given["data"] is None else Reading.of_table(table).of_all
    return calibration(uri, reading, preset.get("claim", {}).get("test"))
