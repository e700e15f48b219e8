"""`vlm data`: look at data before training on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from vlm.config.errors import DataError, ExitCode, VlmError


@click.group(name="data")
def group() -> None:
    """Look at data before training on it."""


def _guarded(command: Callable[..., int]) -> Callable[..., None]:
    """Print a VlmError as one message and leave with its exit code."""

    def run(**arguments: Any) -> None:
        try:
            code = command(**arguments)
        except VlmError as error:
            click.echo(f"error: {error}", err=True)
            code = int(error.exit_code)
        sys.exit(code)

    return run


def _options(image: str, text: str, budget: float, max_pixels: int | None) -> Any:
    from pydantic import ValidationError

    from vlm.config.errors import RequestError
    from vlm.data.options import DataOptions

    table: dict[str, Any] = {"columns": {"image": image, "text": text}, "bad_samples": {"budget": budget}}
    if max_pixels is not None:
        table["max_pixels"] = max_pixels
    try:
        return DataOptions.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


_COLUMNS = [
    click.option("--image", default="auto", show_default=True, help="Field with the picture."),
    click.option(
        "--text", default="auto", show_default=True, help="Field with the text (captions.de for nested)."
    ),
    click.option("--max-pixels", type=click.IntRange(min=1), help="Pixels of a picture, from its header."),
]


def _with_columns(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_COLUMNS):
        command = option(command)
    return command


@group.command("check")
@click.argument("uri", nargs=-1, required=True)
@_with_columns
@click.option(
    "--budget", default=0.01, show_default=True, help="Share of bad samples that is still accepted."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check_command(**arguments: Any) -> None:
    """Decode every sample of URI (a pattern, or files) and count what is wrong; exit code 3 when more than the budget is."""
    _guarded(_check)(**arguments)


def _check(
    uri: tuple[str, ...], image: str, text: str, max_pixels: int | None, budget: float, as_json: bool
) -> int:
    from vlm.data.check import check
    from vlm.data.sources.uri import open_source

    options = _options(image, text, budget, max_pixels)
    source = open_source(",".join(uri), options.limits)
    with click.progressbar(length=len(source), label="checking", file=sys.stderr) as bar:
        step = max(1, len(source) // 100)
        result = check(
            source, options, lambda index: bar.update(step) if index % step == 0 and index else None
        )
    if as_json:
        click.echo(json.dumps({"schema": 1, **result}))
    else:
        _print_check(result)
    return int(ExitCode.DONE if result["within_budget"] else ExitCode.WRONG_DATA)


def _print_check(result: dict[str, Any]) -> None:
    described = ", ".join(f"{name} {value}" for name, value in result["source"].items() if value is not None)
    click.echo(f"detected   {described}")
    click.echo(
        f"samples    {result['samples']}: {result['good']} good, {result['bad']} bad (budget {result['budget']})"
    )
    for reason, count in result["reasons"].items():
        click.echo(f"  {reason:20} {count}")
    for entry in result["first_bad"]:
        click.echo(f"    {entry['key']}: {entry['reason']} {entry['detail']}".rstrip())
    pictures, texts = result["pictures"], result["texts"]
    if pictures["count"]:
        sizes = ", ".join(f"{size} ({count})" for size, count in list(pictures["sizes"].items())[:5])
        click.echo(
            f"pictures   {pictures['count']}, sides {pictures['smallest_side']}..{pictures['largest_side']}: {sizes}"
        )
    if texts["count"]:
        spread = texts["characters"]
        click.echo(
            f"texts      {texts['count']}, {texts['distinct']} distinct; characters "
            f"{spread['min']}..{spread['max']}, median {spread['median']}"
        )
        for repeated, count in texts["most_repeated"].items():
            click.echo(f"  {count} times: {repeated[:80]}")
    click.echo("fields     " + ", ".join(f"{name} ({count})" for name, count in result["fields"].items()))


@group.command("inspect")
@click.argument("uri", nargs=-1, required=True)
@click.option(
    "-n", "count", default=12, show_default=True, type=click.IntRange(1, 1000), help="Samples to show."
)
@_with_columns
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write a contact sheet (PNG)."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(**arguments: Any) -> None:
    """Say what URI was detected as, and show its first samples."""
    _guarded(_inspect)(**arguments)


def _inspect(
    uri: tuple[str, ...],
    count: int,
    image: str,
    text: str,
    max_pixels: int | None,
    output: Path | None,
    as_json: bool,
) -> int:
    from vlm.data.check import contact_sheet, first_samples
    from vlm.data.sources.uri import open_source

    options = _options(image, text, 0.01, max_pixels)
    source = open_source(",".join(uri), options.limits)
    samples = first_samples(source, options, count)
    described = dict(source.describe())
    if output is not None:
        try:
            contact_sheet(samples).save(output, format="PNG")
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", where=str(output)) from error
    shown = [
        {**s, "picture": list(s["picture"].size) if s.get("picture") is not None else None}
        if "bad" not in s
        else s
        for s in samples
    ]
    if as_json:
        sheet = str(output) if output is not None else None
        click.echo(json.dumps({"schema": 1, "source": described, "samples": shown, "sheet": sheet}))
        return int(ExitCode.DONE)
    click.echo(
        "detected   " + ", ".join(f"{name} {value}" for name, value in described.items() if value is not None)
    )
    for sample in shown:
        if "bad" in sample:
            click.echo(f"{sample['key']}: BAD {sample['bad']} {sample['detail']}".rstrip())
            continue
        size = "x".join(map(str, sample["picture"])) if sample["picture"] else "no picture"
        click.echo(f"{sample['key']}  {size}  {(sample['text'] or '')[:100]!r}")
        click.echo("    " + ", ".join(f"{k}={str(v)[:40]}" for k, v in sample["fields"].items())[:200])
    if output is not None:
        click.echo(f"sheet      {output}")
    return int(ExitCode.DONE)
