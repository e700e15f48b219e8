"""`vlm data`: look at data before training on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm.cli.output import echo_json, echo_result, log, wants_bar
from vlm.config.errors import DataError, ExitCode

if TYPE_CHECKING:
    from vlm.data.options import DataOptions
    from vlm.data.sources.base import Source


@click.group()
def group() -> None:
    """Check and inspect data."""


_ADDRESS = [
    click.argument("uri", nargs=-1, required=True),
    click.option("--image", default="auto", show_default=True, help="Field with the picture."),
    click.option(
        "--text", default="auto", show_default=True, help="Field with the text; captions.de for nested ones."
    ),
    click.option(
        "--max-pixels", type=click.IntRange(1, 2**31), help="Pixels of a picture at most, from its header."
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
]


def _addressed(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_ADDRESS):
        command = option(command)
    return command


def _open(uri: Sequence[str], **table: Any) -> tuple[Source, DataOptions]:
    from vlm.data.options import DataOptions
    from vlm.data.sources.uri import open_source

    if table["max_pixels"] is None:
        del table["max_pixels"]
    columns = {"image": table.pop("image"), "text": table.pop("text")}
    options = DataOptions.model_validate({"columns": columns, **table})
    return open_source(",".join(uri), options.limits), options


@group.command("check")
@_addressed
@click.option(
    "--budget",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of bad samples that is still accepted.",
)
def check_command(uri: Sequence[str], budget: float, as_json: bool, **table: Any) -> None:
    """Decode every sample of URI and count what is wrong.

    URI is a pattern, a folder, files of one kind, or scenes:. Exit code 3 when more samples are bad than the budget
    allows.
    """
    from vlm.data.check import check

    source, options = _open(uri, bad_samples={"budget": budget}, **table)
    result = check(source, options, _progress(len(source)))
    if as_json:
        echo_json({"schema": 1, **result})
    else:
        _print_check(result)
    if not result["within_budget"]:
        log(
            f"{result['bad']} of {result['samples']} samples are bad, more than the budget of {budget:.2%}",
            fg="red",
        )
        click.get_current_context().exit(int(ExitCode.WRONG_DATA))


def _progress(count: int) -> Callable[[int], None] | None:
    """Tells a terminal every percent how far the check is."""
    if not wants_bar():
        return None
    step = max(1, count // 100)

    def show(index: int) -> None:
        if index % step == 0:
            click.echo(f"\rchecking {100 * index // count}%", nl=False, err=True)
        if index == count - 1:
            click.echo("\r\033[K", nl=False, err=True)

    return show


def _described(source: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in source.items() if value is not None)


def _print_check(result: dict[str, Any]) -> None:
    echo_result(f"detected   {_described(result['source'])}")
    echo_result(
        f"samples    {result['samples']}: {result['good']} good, {result['bad']} bad (budget {result['budget']})"
    )
    for reason, count in result["reasons"].items():
        echo_result(f"  {reason:20} {count}")
    for entry in result["first_bad"]:
        echo_result(f"    {entry['key']}: {entry['reason']} {entry['detail']}".rstrip())
    pictures, texts = result["pictures"], result["texts"]
    if pictures["count"]:
        sizes = ", ".join(f"{size} ({count})" for size, count in list(pictures["sizes"].items())[:5])
        sides = f"sides {pictures['smallest_side']}..{pictures['largest_side']}"
        echo_result(f"pictures   {pictures['count']}, {sides}: {sizes}")
    if texts["count"]:
        spread = texts["characters"]
        span = f"characters {spread['min']}..{spread['max']}, median {spread['median']}"
        echo_result(f"texts      {texts['count']}, {texts['distinct']} distinct; {span}")
        for repeated, count in texts["most_repeated"].items():
            echo_result(f"  {count} times: {repeated[:80]}")
    echo_result("fields     " + ", ".join(f"{name} ({count})" for name, count in result["fields"].items()))


@group.command("inspect")
@_addressed
@click.option(
    "-n", "count", default=12, show_default=True, type=click.IntRange(1, 1000), help="Samples to show."
)
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write a contact sheet, a PNG file."
)
def inspect_command(uri: Sequence[str], count: int, output: Path | None, as_json: bool, **table: Any) -> None:
    """Say what URI was detected as, and show its first samples."""
    from vlm.data.check import contact_sheet, first_samples

    source, options = _open(uri, **table)
    samples = first_samples(source, options, count)
    if output is not None:
        try:
            contact_sheet(samples).save(output, format="PNG")
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", where=str(output)) from error
    shown = [
        s if "bad" in s else {**s, "picture": list(s["picture"].size) if s["picture"] is not None else None}
        for s in samples
    ]
    described = dict(source.describe())
    if as_json:
        echo_json({"schema": 1, "source": described, "samples": shown, "sheet": output})
        return
    echo_result(f"detected   {_described(described)}")
    for sample in shown:
        if "bad" in sample:
            echo_result(f"{sample['key']}: BAD {sample['bad']} {sample['detail']}".rstrip())
            continue
        size = "x".join(map(str, sample["picture"])) if sample["picture"] else "no picture"
        echo_result(f"{sample['key']}  {size}  {(sample['text'] or '')[:100]!r}")
        echo_result("    " + ", ".join(f"{k}={str(v)[:40]}" for k, v in sample["fields"].items())[:200])
    if output is not None:
        echo_result(f"sheet      {output}")
