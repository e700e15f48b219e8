"""Lines in, JSON lines out."""

from __future__ import annotations

import codecs
import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from vlm.config.errors import DataError

Item = TypeVar("Item")

MAX_LINE = 1 << 20
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_lines(source: str, *, separator: bytes = b"\n") -> Iterator[bytes]:
    """The lines of a file, or of stdin for `-`, without their ends and without the mark that Windows editors put before the first.
    Raises DataError for a missing or endless line."""
    for number, line in enumerate(_read_lines(source, separator)):
        yield line if number else line.removeprefix(codecs.BOM_UTF8)


def _read_lines(source: str, separator: bytes) -> Iterator[bytes]:
    if source == "-":
        yield from _split(sys.stdin.buffer, separator, "stdin")
        return
    try:
        file = open(source, "rb")  # noqa: SIM115 - the errors of opening and of reading differ
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=source, remedy="give a file, or - for stdin") from error
    with file:
        yield from _split(file, separator, source)


def _split(file: BinaryIO, separator: bytes, where: str) -> Iterator[bytes]:
    if separator == b"\n":
        for number in itertools.count(1):
            line = file.readline(MAX_LINE + 1)
            if not line:
                return
            if len(line) > MAX_LINE:
                raise DataError(f"longer than {MAX_LINE} bytes", where=f"{where}:{number}", remedy="expected one input a line")
            yield line.rstrip(b"\r\n")
    rest = b""
    while block := file.read(1 << 16):
        *whole, rest = (rest + block).split(separator)
        yield from whole
        if len(rest) > MAX_LINE:
            raise DataError(f"longer than {MAX_LINE} bytes between separators", where=where)
    if rest:
        yield rest


def picture_paths(source: str, *, separator: bytes = b"\n") -> Iterator[str]:
    """Paths of pictures: a line each of a file or stdin, all pictures of a directory, or the one picture itself."""
    path = Path(source)
    if source != "-" and path.is_dir():
        found = [str(p) for p in sorted(path.rglob("*")) if p.suffix.lower() in PICTURES and p.is_file()]
        if not found:
            raise DataError("the directory holds no pictures", where=source, remedy=f"expected files that end in {', '.join(PICTURES)}")
        yield from found
    elif source != "-" and path.suffix.lower() in PICTURES:
        yield source
    else:
        yield from (os.fsdecode(line) for line in read_lines(source, separator=separator))


def numbers(row: np.ndarray) -> str:
    """A float32 vector as a JSON array that reads back to the same bits."""
    return "[" + ", ".join(map("%.9g".__mod__, row.tolist())) + "]"


def batches(items: Iterator[Item], size: int) -> Iterator[list[Item]]:
    while batch := list(itertools.islice(items, size)):
        yield batch
