"""`vlm data`: look at data before training on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm.cli.output import check_writable, echo_json, echo_result, log, wants_bar
from vlm.config.errors import ExitCode, RunFailed

if TYPE_CHECKING:
    from vlm.data.options import DataOptions
    from vlm.data.sources.base import Source


@click.group()
def group() -> None:
    """Check and inspect data."""


_ADDRESS = [
    click.argument("uri", nargs=-1),
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


def _open(uri: Sequence[str], *, preset: str | None = None, **table: Any) -> tuple[Source, DataOptions]:
    """The source and its table: that of a preset where one is named, with what the command line says on top."""
    from vlm.data.loader import open_split
    from vlm.data.options import DataOptions

    if not uri and preset is None:
        raise click.UsageError("Missing argument 'URI...'.")
    if table["max_pixels"] is None:
        del table["max_pixels"]
    columns = {"image": table.pop("image"), "text": table.pop("text")}
    values: dict[str, Any] = {}
    if preset is not None:
        values = _table_of(preset)
        columns = {**values.get("columns", {}), **{name: field for name, field in columns.items() if field != "auto"}}
    if uri:
        values = {name: value for name, value in values.items() if name != "mixture"} | {"source": ",".join(uri)}
    options = DataOptions.model_validate({**values, "columns": columns, **table})
    return open_split(options, "train"), options


def _table_of(preset: str) -> dict[str, Any]:
    """What the `[data]` table of a preset's first stage says."""
    from vlm.training.preset import load_preset, stages_of

    _, resolved = load_preset(preset)
    return stages_of(resolved)[0].data.model_dump(exclude_unset=True)


@group.command("check")
@_addressed
@click.option(
    "--budget",
    type=click.FloatRange(0, 1),
    default=0.01,
    show_default=True,
    help="Share of bad samples that is still accepted.",
)
@click.option("--preset", metavar="PRESET", help="Check as this preset reads it; without URI, its own training data.")
@click.option("--placeholders", is_flag=True, help="Read messages, and compare the pictures they name with those there are.")
def check_command(uri: Sequence[str], budget: float, preset: str | None, placeholders: bool, as_json: bool, **table: Any) -> None:
    """Decode every sample of URI and count what is wrong.

    URI is tar shards, a folder, JSON lines, CSV, a JSON array or scenes:. Exit code 3 when more samples are bad than the budget
    allows. Samples with messages and no caption are read as conversations.
    """
    from vlm.data.check import check

    source, options = _open(uri, preset=preset, bad_samples={"budget": budget}, **table)
    if not options.conversations and (placeholders or (preset is None and _talks(source, options))):
        options = _with_talk(options)
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


def _with_talk(options: DataOptions) -> DataOptions:
    """The options with a stream that reads messages."""
    talk = {"text": {"kind": "conversation", "messages": "auto", "text_only": True}}
    values = options.model_dump(exclude_unset=True)
    return type(options).model_validate({**values, "streams": {**values.get("streams", {}), **talk}})


def _talks(source: Source, options: DataOptions) -> bool:
    """Whether the first of these samples that can be read is a conversation and has no caption: nothing else could be read of it."""
    from vlm.data.captions import AUTO_TEXT
    from vlm.data.samples import BadSample, field_at
    from vlm.data.streams.messages import AUTO_MESSAGES
    from vlm.runtime.pictures import BadPicture

    if options.columns.text != "auto":
        return False
    for index in range(min(len(source), 10)):
        try:
            fields = source.read(index).fields
        except (BadSample, BadPicture):
            continue
        talks = any(isinstance(fields.get(name), list) for name in AUTO_MESSAGES)
        return talks and all(field_at(fields, name) is None for name in AUTO_TEXT)
    return False


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
    shown = {name: " ".join(map(str, value)) if isinstance(value, list | tuple) else value for name, value in source.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value is not None)


def _print_check(result: dict[str, Any]) -> None:
    echo_result(f"detected   {_described(result['source'])}")
    echo_result(
        f"samples    {result['samples']}: {result['good']} good, {result['bad']} bad (at most {result['budget']} may be)"
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
    for name, counts in result.get("placeholders", {}).items():
        named = ", ".join(f"{count}: {samples}" for count, samples in counts.items())
        echo_result(f"pictures named in the messages of {name}, and how many samples do: {named}")
    for name, numbers in result.get("numbers", {}).items():
        spread = f", {numbers['min']:g}..{numbers['max']:g}, mean {numbers['mean']:g}" if numbers["count"] else ""
        echo_result(f"numbers of {name}: {numbers['count']}{spread}")
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

    if output is not None:
        check_writable(output)
    source, options = _open(uri, **table)
    if _talks(source, options):
        options = _with_talk(options)
    samples = first_samples(source, options, count)
    if output is not None:
        try:
            contact_sheet(samples).save(output, format="PNG")
        except OSError as error:
            raise RunFailed(f"cannot be written: {error.strerror}", where=str(output)) from error
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


@group.command("overlap")
@_addressed
@click.option("--with", "other", metavar="URI", help="Evaluation data [default: data.val of --preset].")
@click.option("--preset", metavar="PRESET", help="Read as this preset does; without URI, its own training data.")
@click.option("--bits", type=click.IntRange(0, 32), default=6, show_default=True, help="Signs of 128 in which near pictures may differ.")
@click.option("--colour", type=click.IntRange(0, 255), default=16, show_default=True, help="Levels in which their thumbnails may differ.")
@click.option("--words", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="Share of a text's runs of 13 words that is a copy.")
@click.option("--texts", is_flag=True, help="Also write samples that share nothing but an equal short text.")
@click.option("--budget", type=click.FloatRange(0, 1), default=1, show_default=True, help="Share of evaluation samples that may be shared.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write the keys to leave out, for data.exclude.")
def overlap_command(
    uri: Sequence[str], other: str | None, preset: str | None, bits: int, colour: int, words: float, texts: bool, budget: float,
    output: Path | None, as_json: bool, **table: Any,
) -> None:  # fmt: skip
    """Find what training data (URI) and evaluation data share: pictures, near pictures, texts.

    A picture is near if at most --bits of the 128 signs of its brightness steps and --colour levels of its thumbnail differ; a long
    text is a copy if --words of its runs of 13 words are found in one training text. `data.exclude = FILE` leaves out what --output
    wrote. Exit code 3 when more evaluation samples than --budget are shared.
    """
    from vlm.cli.overlap import run_overlap

    if output is not None:
        check_writable(output)
    source, options = _open(uri, preset=preset, **table)
    address = other or options.val
    if address is None:
        raise click.UsageError("Missing option '--with URI'.")
    against, own = _open([address], preset=preset, **table)
    found = run_overlap((source, options), (against, own), bits=bits, colour=colour, words=words, progress=_progress)
    keys = found.keys(texts=texts)
    if output is not None:
        found.write(output, texts=texts)
    summary = found.summary() | {"output": output, "written": len(keys)}
    if as_json:
        echo_json({"schema": 1, **summary})
    else:
        for line in found.lines():
            echo_result(line)
        if output is not None:
            echo_result(f"written    {len(keys)} keys: data.exclude = \"{output}\"")
    if found.share(texts=texts) > budget:
        log(f"{found.share(texts=texts):.2%} of the evaluation samples are shared, more than the budget of {budget:.2%}", fg="red")
        click.get_current_context().exit(int(ExitCode.WRONG_DATA))
