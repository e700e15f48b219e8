"""`vlm embed`: pictures or texts to vectors, a JSON line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from vlm.config.errors import DataError, ExitCode, RequestError

if TYPE_CHECKING:
    from vlm.runtime.embedder import Embedder


@click.command(name="embed")
@click.argument("model", metavar="MODEL")
@click.option("--images", metavar="-|PATH", help="a file or stdin (-) with a path a line, a directory, or one picture")
@click.option("--texts", metavar="-|PATH", help="a file or stdin (-) with a text a line")
@click.option("-0", "--null", is_flag=True, help="lines end with NUL, as find -print0 writes them")
@click.option("--batch-size", type=click.IntRange(1, 4096), default=32, show_default=True, help="inputs of one model call")
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator [default: the framework's choice]")
def command(model: str, images: str | None, texts: str | None, null: bool, batch_size: int, threads: int | None) -> None:
    """Embed pictures or texts: prints {"input", "embedding"} a line, in order, vectors of unit length.

    MODEL is a run, a Hugging Face directory or a bundle. An input that cannot be embedded gives {"input", "error"},
    and the exit code is then 3.
    """
    from vlm.cli.encoders import open_embedder

    if (images is None) == (texts is None):
        raise RequestError("expected exactly one of --images and --texts", remedy="vlm embed MODEL --images - < paths.txt")
    separator = b"\0" if null else b"\n"
    embedder = open_embedder(model, threads=threads, batch_size=batch_size)
    rows = _pictures(embedder, images, separator, batch_size) if images is not None else _texts(embedder, str(texts), separator, batch_size)
    failed = total = 0
    for batch in rows:
        for line, error in batch:
            sys.stdout.write(line + "\n")
            failed += error
        total += len(batch)
        sys.stdout.flush()
    if failed:
        click.echo(f"{failed} of {total} inputs could not be embedded; their lines say why", err=True)
        sys.exit(int(ExitCode.WRONG_DATA))


Lines = list[tuple[str, bool]]


def _pictures(embedder: Embedder, source: str, separator: bytes, batch_size: int) -> Iterator[Lines]:
    from concurrent.futures import ThreadPoolExecutor

    from vlm.cli.encoders import picture_steps
    from vlm.cli.streams import batches, picture_paths

    prepare, encode = picture_steps(embedder)

    def attempt(path: str) -> Any:
        try:
            if not path:
                raise DataError("the path is empty")
            return prepare(path)
        except DataError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        for paths in batches(picture_paths(source, separator=separator), batch_size):
            yield _lines(paths, list(pool.map(attempt, paths)), encode)


def _texts(embedder: Embedder, source: str, separator: bytes, batch_size: int) -> Iterator[Lines]:
    from vlm.cli.streams import batches, read_lines

    for lines in batches(read_lines(source, separator=separator), batch_size):
        inputs = [line.decode("utf-8", "replace") for line in lines]
        yield _lines(inputs, [_text(line) for line in lines], embedder.encode_text)


def _text(line: bytes) -> str | DataError:
    try:
        return line.decode("utf-8") or DataError("the text is empty")
    except UnicodeDecodeError as error:
        return DataError(f"not UTF-8 at byte {error.start}")


def _lines(inputs: Any, prepared: list[Any], encode: Any) -> Lines:
    """Output lines in the order of the inputs, and whether each is an error."""
    from vlm.cli.streams import numbers

    good = [value for value in prepared if not isinstance(value, DataError)]
    vectors = iter(encode(good) if good else [])
    out: Lines = []
    for given, value in zip(inputs, prepared):
        name = json.dumps(given)
        if isinstance(value, DataError):
            out.append((f'{{"input": {name}, "error": {json.dumps(value.message)}}}', True))
        else:
            out.append((f'{{"input": {name}, "embedding": {numbers(next(vectors))}}}', False))
    return out
