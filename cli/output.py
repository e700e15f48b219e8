"""What the command line prints: results as JSON or text on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from vlm.config.errors import RequestError, RunFailed


def echo_json(obj: Any, *, line: bool = False) -> None:
    """One JSON value on stdout, indented on a terminal; `line`: always on one line, and flushed (JSON lines).

    Always ASCII, so that any locale and any file name can be printed; numbers that are not finite become null.
    """
    indent = 2 if sys.stdout.isatty() and not line else None
    sys.stdout.write(json.dumps(_plain(obj), indent=indent, allow_nan=False) + "\n")
    if line:
        sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch, without importing either
        return _plain(value.tolist())
    if hasattr(value, "isoformat"):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} is no JSON value")


def check_writable(path: Path) -> None:
    """Raises RequestError or RunFailed where a file cannot be written, before the work whose result it is to hold."""
    parent = path.absolute().parent
    above = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if path.is_dir():
        raise RequestError("is a directory, expected a file", where=str(path))
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise RunFailed(f"cannot be written: {error.strerror}", where=str(path), remedy="choose another --output") from error


def echo_result(text: str = "") -> None:
    """A line of the result on stdout."""
    click.echo(text)


def log(text: str, **style: Any) -> None:
    """A line for the person who watches, on stderr; `style` as in click.style, dropped where colour is unwanted."""
    click.echo(click.style(text, **style) if style and colour() else text, err=True)


def colour(stream: Any = None) -> bool:
    """Whether a stream (default stderr) takes colour: a terminal, no NO_COLOR, and not a dumb one."""
    stream = sys.stderr if stream is None else stream
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and _is_terminal(stream)


def wants_bar() -> bool:
    """Whether progress bars are drawn: only where stderr is a terminal that a person watches. The one place to ask."""
    return _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # no stream at all, or a closed one
        return False


def table(rows: Sequence[Sequence[str]], header: Sequence[str]) -> str:
    """Rows in columns of equal width, for people; scripts use --json."""
    lines = [list(header), *[list(row) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )
