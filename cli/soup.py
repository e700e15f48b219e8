"""`vlm soup`: the weights of several models as one."""

from __future__ import annotations

from pathlib import Path

import click

from vlm.cli.output import echo_json, echo_result
from vlm.config.errors import RequestError

_EPILOG = """\b
Examples:
  vlm soup runs/a runs/b runs/c --output soup                       # the mean of runs of one recipe
  vlm soup runs/start runs/tuned --weights 0.5,0.5 --output wise    # between a model and what it was finetuned to
"""


@click.command(epilog=_EPILOG)
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--weights", metavar="W,W,...", help="share of each model, of sum 1 [default: all alike]")
@click.option("--output", required=True, type=click.Path(path_type=Path), metavar="DIR", help="model directory to write")
@click.option("--json", "as_json", is_flag=True, help="print what was done as one JSON object")
def command(models: tuple[str, ...], weights: str | None, output: Path, as_json: bool) -> None:
    """Average the weights of models of one architecture, or go a part of the way from one to another.

    MODEL is a run or a Hugging Face directory. The result is a model directory: evaluate it before use, since an average of models that
    did not begin alike is worth nothing.
    """
    shares = None if weights is None else _numbers(weights)
    from vlm.workflows.soup import soup

    made = soup(models, output, shares)
    if as_json:
        echo_json(made)
    else:
        parts = " + ".join(f"{part['weight']:g} {part['path']}" for part in made["models"])
        echo_result(f"{made['output']}: {parts}; {made['parameters']:,} parameters")


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError as error:
        raise RequestError(f"{text!r} is no list of numbers", where="--weights", remedy="for example --weights 0.7,0.3") from error
