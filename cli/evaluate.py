"""`vlm evaluate`: one task on one model, as a table or as JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm.cli.output import check_writable, echo_json, echo_result, log, wants_bar
from vlm.config.errors import DataError, RequestError

if TYPE_CHECKING:
    from vlm.evaluation.reading import Reading
    from vlm.evaluation.task import Task

TASKS = (
    "retrieval", "compositional", "zero-shot", "linear-probe", "classification", "perplexity", "text-probe",
    "caption", "vqa", "grounding", "hallucination", "preference", "localisation", "cost",
)  # fmt: skip

_EPILOG = """\b
MODEL is a run, a model directory in Hugging Face layout, or an exported bundle.
Examples:
  vlm evaluate runs/emoji --task retrieval --data 'data/emoji/val-*.tar'
  vlm evaluate runs/emoji --task zero-shot --labels-from category --template 'a drawing of a {}'
  vlm evaluate runs/emoji --task zero-shot --labels-from category --descriptors seen.json --control names --control random-words
  vlm evaluate bundle --task zero-shot --data photos/ --classes names.txt --none-below 0.4 --json
  vlm evaluate runs/emoji --task compositional --data 'scenes:?n=1000&split=test' --text-from captions
  vlm evaluate runs/lm --task perplexity --data 'text/*.jsonl.gz' --gate 'bits_per_character<=2.5'
  vlm evaluate runs/llava --task vqa --data 'scenes:?n=500&split=val' --control none --gate 'lower:over_none.exact>=1'
  vlm evaluate runs/lm --task perplexity --data 'text/*.jsonl.gz' model.length=4096 model.attention.kind=hierarchical
  vlm evaluate runs/llava --task caption --data 'data/emoji/val-*.tar' --prompt 'What is this?' --limit 200
"""


@click.command(epilog=_EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[model.KEY=VALUE]...")
@click.option("--task", required=True, type=click.Choice(TASKS), help="what to measure")
@click.option(
    "--data", metavar="URI", help="tar shards, a folder, JSON lines, CSV or scenes: [default: the run's data.val]"
)
@click.option(
    "--text-from", metavar="FIELD", help="field with the text, dotted for nested ones (captions.de)"
)
@click.option(
    "--labels-from",
    metavar="FIELD",
    multiple=True,
    help="field with a sample's class; the first that the data has",
)
@click.option("--classes", metavar="FILE", help="classes: a name a line, or JSON; FILE#LIST picks a list")
@click.option(
    "--template",
    metavar="TEXT",
    multiple=True,
    help="prompt with {} for the class name; several are averaged [default: the one that the model has learned, else {}]",
)
@click.option("--descriptors", metavar="FILE", help="zero-shot: JSON of class -> what can be seen of it, one prompt each")
@click.option(
    "--reduce",
    type=click.Choice(("embedding-mean", "score-mean", "score-max")),
    help="zero-shot: how a class's prompts become one score [default: embedding-mean, of descriptors score-mean]",
)
@click.option("--explain", type=click.IntRange(min=0), metavar="N", help="best fitting descriptors that each example keeps")
@click.option(
    "--none-below",
    type=click.FloatRange(0, 1),
    metavar="P",
    help='below this probability the answer is "none of these"',
)
@click.option("--train", metavar="URI", help="probes: data to fit on [default: folds by concept]")
@click.option(
    "--prompt", metavar="TEXT", help="what the user says about each picture; for vqa with {} for the question"
)
@click.option(
    "--questions-from", metavar="FIELD", help="vqa: field with the list of a sample's questions [default: questions]"
)
@click.option(
    "--mode",
    "modes",
    type=click.Choice(("relation", "attribute")),
    multiple=True,
    help="compositional: what is exchanged in a caption to make it wrong [default: both]",
)
@click.option(
    "--wrong-from", metavar="FIELD", multiple=True, help="compositional: field with a wrong caption [default: captions are made wrong]"
)
@click.option("--pairs-from", metavar="FIELD", help="compositional: field that two samples share which are a pair (Winoground)")
@click.option(
    "--control",
    "controls",
    type=click.Choice(("shuffled", "none", "off", "names", "random-words", "other-class")),
    multiple=True,
    help="also with another picture or without one; off: neither [default: shuffled and none for caption, vqa and grounding]; "
    "of descriptors: names alone, random words, those of another class",
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="longest answer in tokens [default: the task's]")
@click.option("--limit", type=click.IntRange(min=1), help="evaluate a random draw of so many samples")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, help="of intervals, folds and draws [default: 0]"
)
@click.option(
    "--bad-budget",
    type=click.FloatRange(0, 1),
    default=0.01,
    help="share of samples that may be bad [default: 0.01]",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads [default: all cores]")
@click.option(
    "--batch", type=click.IntRange(min=1), default=64, help="pictures of one forward pass [default: 64]"
)
@click.option(
    "--examples",
    type=click.IntRange(0, 1000),
    help="keep so many random examples [default: 12 with --save, else 0]",
)
@click.option("--name", help="name of the result in reports [default: the task]")
@click.option(
    "--gate",
    metavar="CONDITION",
    multiple=True,
    help="leave with exit code 5 unless it holds: 'image_to_text/r@1>=20'",
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="write the result to FILE")
@click.option("--save", is_flag=True, help="store the result in the run MODEL, for vlm report")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object")
def command(model: Path, overrides: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure a model: retrieval, zero-shot, linear probe, perplexity; captions, answers, their cost.

    model.KEY=VALUE changes how the model is asked, as model.attention.kind=hierarchical does; its weights must still fit.
    """
    from vlm.evaluation.encoder import describe_model, open_model
    from vlm.evaluation.result import Gate, save_results, write_json
    from vlm.evaluation.session import Session
    from vlm.evaluation.table import table_of

    gates = [Gate.parse(text) for text in given["gate"]]
    run = _run_of(model)
    if given["save"] and run is None:
        raise RequestError(
            "--save needs a run: a directory with preset.toml",
            where=str(model),
            remedy="or use --output FILE",
        )
    if given["output"] is not None:
        check_writable(given["output"])  # before the work, not after it
    task = _task(given)
    data, reading = _data(given, run)
    changes = _changes(overrides)
    if changes and given["save"]:
        raise RequestError("--save stores figures of the run as it is, and these change the model", remedy="use --output FILE")
    opened = open_model(model, threads=given["threads"], batch=given["batch"], changes=changes)
    session = Session(
        opened,
        data,
        reading=reading,
        model_info=describe_model(model) | ({"changes": changes} if changes else {}),
        bad_budget=given["bad_budget"],
        batch=given["batch"],
        progress=_bar() if wants_bar() else None,
        written=_words() if wants_bar() else None,
    )
    result = session.run(task)  # type: ignore[arg-type]
    for line in result.bad.get("first", []):
        log(f"bad sample left out: {line}")
    if given["output"] is not None:
        write_json(given["output"], result.as_json())
    if given["save"] and run is not None:
        log(f"stored in {save_results([result], run)[0]}; vlm report {run} shows it")
    if as_json:
        echo_json(result.as_json(examples=False))
    else:
        echo_result(table_of(result))
    for gate in gates:
        gate.check(result)


def _changes(overrides: tuple[str, ...]) -> dict[str, Any]:
    """The settings of the model that overrides ask for. Raises RequestError for one of another table."""
    from vlm.config.overrides import apply_overrides, parse_override
    from vlm.config.tree import Node

    for text in overrides:
        override = parse_override(text)
        if override.parts[0] != "model" or len(override.parts) < 2:
            raise RequestError(f"{override.key} is no setting of the model", remedy="expected model.KEY=VALUE")
    found: dict[str, Any] = apply_overrides(Node({}), overrides).plain().get("model", {})
    return found


def _run_of(model: Path) -> Path | None:
    return model if (model / "preset.toml").is_file() else None


def _task(given: dict[str, Any]) -> Task:
    """The task's options. Raises RequestError for an option that the task has not."""
    import pydantic

    from vlm.evaluation import TaskOptions

    values = {
        "task": given["task"],
        "name": given["name"],
        "limit": given["limit"],
        "seed": given["seed"],
        "examples": given["examples"] if given["examples"] is not None else 12 * given["save"],
        "labels_from": given["labels_from"] or None,
        "classes": given["classes"],
        "templates": given["template"] or None,
        "descriptors": given["descriptors"],
        "reduce": given["reduce"],
        "explain": given["explain"],
        "none_below": given["none_below"],
        "train": given["train"],
        "prompt": given["prompt"],
        "questions_from": given["questions_from"],
        "modes": given["modes"] or None,
        "wrong_from": given["wrong_from"] or None,
        "pairs_from": given["pairs_from"],
        "controls": _controls(given["controls"]),
        "max_new_tokens": given["max_new_tokens"],
    }
    options = {
        "controls": "--control",
        "modes": "--mode",
        "wrong_from": "--wrong-from",
        "pairs_from": "--pairs-from",
        "max_new_tokens": "--max-new-tokens",
        "questions_from": "--questions-from",
        "templates": "--template",
        "labels_from": "--labels-from",
        "none_below": "--none-below",
    }
    try:
        adapter: pydantic.TypeAdapter[Task] = pydantic.TypeAdapter(TaskOptions)
        return adapter.validate_python({name: value for name, value in values.items() if value is not None})
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        name = next((str(part) for part in reversed(first["loc"]) if isinstance(part, str)), "task")
        option = options.get(name, f"--{name}")
        if first["type"] == "extra_forbidden":
            raise RequestError(f"{option} does not go with --task {given['task']}") from error
        message = str(first["msg"]).removeprefix("Value error, ")
        remedy = "give --labels-from FIELD or --classes FILE" if "needs classes" in message else None
        raise RequestError(
            message if len(first["loc"]) < 2 else f"{option}: {message}", remedy=remedy
        ) from error


def _controls(given: tuple[str, ...]) -> tuple[str, ...] | None:
    """The controls asked for, None for those of the task. Raises RequestError for `off` beside another."""
    if "off" not in given:
        return given or None
    if len(set(given)) > 1:
        raise RequestError("--control off does not go with other controls")
    return ()


def _data(given: dict[str, Any], run: Path | None) -> tuple[str, Reading]:
    """The address of the data and how it is read: as given, else as the run validates. Raises RequestError."""
    from vlm.evaluation.reading import Reading

    preset = _preset_of(run).get("data", {}) if run is not None else {}
    uri = given["data"]
    if uri is None:
        uri = preset.get("val")
        if not isinstance(uri, str):
            raise RequestError(
                "no data to evaluate on",
                remedy="give --data URI" if run is None else "the run has no data.val: give --data URI",
            )
        log(f"data: {uri} (the run's data.val)")
    reading = Reading.of_table(preset)
    reading = reading if given["data"] is None else reading.of_all
    return uri, reading if given["text_from"] is None else replace(reading, text=given["text_from"])


def _preset_of(run: Path) -> dict[str, Any]:
    import tomllib

    path = run / "preset.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from error


def _bar() -> Any:
    def progress(count: int) -> None:
        click.echo(f"\r{count:,} pictures embedded", err=True, nl=False)

    return progress


def _words() -> Any:
    def written(count: int, what: str) -> None:
        click.echo(f"\r{what}: {count:,}", err=True, nl=False)

    return written
