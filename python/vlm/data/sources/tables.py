"""CSV and TSV: a header, then a sample a row, as open_clip and spreadsheets write them.

The rows go as JSON lines into an unnamed temporary file, each on the line where it begins in its own file, and from there it is
JSON lines: a picture is a path beside the file, and a bad row is named by its line.
"""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

from vlm.config.errors import DataError
from vlm.data.sources.json_lines import JsonLinesSource, open_plain
from vlm.data.sources.readers import MAX_RECORD
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

_SEPARATORS = "\t;,"


class TableSource(JsonLinesSource):
    """The rows of some files. Columns are fields, all text; an empty cell is no field."""

    kind = "table (CSV or TSV)"

    def __init__(self, paths: Sequence[str], limits: PictureLimits = DEFAULT_LIMITS) -> None:
        self._bad: dict[tuple[int, int], list[str]] = {}
        super().__init__(paths, limits)

    def _opened(self, path: str) -> int:
        bad: dict[int, list[str]] = {}
        with open(open_plain(path), "rb") as raw, tempfile.TemporaryFile() as file:
            raw.seek(0)
            text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape", newline="")
            at = 1
            for line, row in _rows(text, path):
                file.write(b"\n" * (line - at) + _line(row, line, bad) + b"\n")
                at = line + 1
            file.flush()
            self._bad |= {(len(self._files), line): problem for line, problem in bad.items()}
            return os.dup(file.fileno())

    def recipe(self, index: int) -> Any:
        file, row = self._place(index)
        problem = self._bad.get((file, int(self._rows[file][row])))
        return super().recipe(index) if problem is None else [None, problem]


def separator_of(header: str, path: str) -> str:
    """A tab, semicolon or comma: the first of them that the header has; a .tsv has tabs."""
    if path.lower().removesuffix(".gz").endswith(".tsv"):
        return "\t"
    return next((mark for mark in _SEPARATORS if mark in header), ",")


def _rows(text: io.TextIOWrapper, path: str) -> Iterator[tuple[int, dict[str, str] | str]]:
    """(line on which it begins, fields by column or what is wrong) of each row that is not blank.

    Raises DataError for a header that names no columns, and for a cell without an end.
    """
    header = text.readline(MAX_RECORD)
    mark = separator_of(header, path)
    columns = [name.strip() for name in next(csv.reader([header], delimiter=mark), [])]
    if not columns or "" in columns or len(set(columns)) < len(columns) or _undecoded(header):
        raise DataError(
            f"the first line names no columns: {header.strip()[:100].encode('utf-8', 'replace').decode()!r}",
            where=f"{path}:1",
            remedy="expected a header such as filepath,title or image,caption: names apart, none empty, none twice",
        )
    reader = csv.reader(text, delimiter=mark)
    begins = 2
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"not a table: {error}", where=f"{path}:{begins}", remedy="is a quote without its end?") from error
        if row is None:
            return
        if len(row) == len(columns):
            yield begins, {name: cell for name, cell in zip(columns, row) if cell}
        elif row:
            yield begins, f"{len(row)} cells where {len(columns)} columns are"
        begins = 2 + reader.line_num


def _line(row: dict[str, str] | str, number: int, bad: dict[int, list[str]]) -> bytes:
    """The row as a JSON line; what is wrong with it goes to `bad`."""
    if isinstance(row, str):
        bad[number] = ["bad_row", row]
        return json.dumps(row).encode()
    odd = [name for name, cell in row.items() if _undecoded(cell)]
    if odd:
        bad[number] = ["bad_encoding", f"column {odd[0]} is not UTF-8"]
    return json.dumps(row).encode()


def _undecoded(text: str) -> bool:
    """Whether bytes that are not UTF-8 stand in it."""
    return any("\udc80" <= character <= "\udcff" for character in text)
