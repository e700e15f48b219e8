"""JSON lines: one object a line, with a picture beside it or text alone; plain or gzipped."""

from __future__ import annotations

import gzip
import os
import tempfile
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm.config.errors import DataError
from vlm.data.samples import BadSample, Sample, distinct, stable_id
from vlm.data.sources.readers import MAX_RECORD, JsonLinesReader, decode_text
from vlm.data.sources.webdataset import short_names
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

MAX_UNPACKED = 16 * 1024**3
"""Bytes of one gzipped file after unpacking; a larger one is refused."""
_CHUNK = 1 << 22


class JsonLinesSource:
    """All lines of some files that are not blank. The id of a sample is that of its content, its key the row."""

    kind = "JSON lines"

    def __init__(self, paths: Sequence[str], limits: PictureLimits = DEFAULT_LIMITS) -> None:
        self._files: list[int] = []
        self.paths = list(paths)
        self.names = short_names(self.paths)
        self.root = os.path.dirname(os.path.abspath(self.paths[0]))
        self._reader = JsonLinesReader(self.root, limits)
        for path in self.paths:
            self._files.append(self._opened(path))
        self._starts: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []
        ids: list[int] = []
        for handle in self._files:
            starts, rows, hashes = _scan(handle)
            self._starts.append(starts)
            self._rows.append(rows)
            ids += hashes
        self._first = np.cumsum([0] + [len(rows) for rows in self._rows])
        self.ids = distinct(np.asarray(ids, np.int64))

    def _opened(self, path: str) -> int:
        """A descriptor of the lines of a file."""
        return open_plain(path)

    def __len__(self) -> int:
        return int(self._first[-1])

    def _place(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first, index, side="right")) - 1
        return file, index - int(self._first[file])

    def key(self, index: int) -> str:
        file, row = self._place(index)
        return f"{self.names[file]}:{int(self._rows[file][row])}"

    def recipe(self, index: int) -> Any:
        file, row = self._place(index)
        start, end = (int(v) for v in self._starts[file][row])
        if end - start > MAX_RECORD:
            return [None, "text_too_long"]
        try:
            return [decode_text(os.pread(self._files[file], end - start, start)), None]
        except BadSample as error:
            return [None, error.reason]

    def spec(self) -> dict[str, Any]:
        return {"kind": "jsonl", "root": self.root}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(self.recipe(index)))

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": self.kind,
            "samples": len(self),
            "files": len(self.paths),
            "first_file": self.paths[0],
        }


def open_plain(path: str) -> int:
    """A descriptor of the file, or of its unpacked content in an unnamed temporary file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", where=path) from error
    try:
        packed = os.pread(handle, 2, 0) == b"\x1f\x8b"
    except OSError as error:  # a folder, for one
        os.close(handle)
        raise DataError(f"cannot be read: {error.strerror}", where=path) from error
    if not packed:
        return handle
    total = 0
    try:
        with open(handle, "rb") as file, gzip.GzipFile(fileobj=file) as stream, tempfile.TemporaryFile() as unpacked:
            while chunk := stream.read(_CHUNK):
                total += len(chunk)
                if total > MAX_UNPACKED:
                    raise DataError(f"more than {MAX_UNPACKED} bytes after unpacking", where=path)
                unpacked.write(chunk)
            unpacked.flush()
            return os.dup(unpacked.fileno())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"damaged gzip file: {error}", where=path) from error


def _scan(handle: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """([n, 2] start and end in bytes, [n] row numbers from 1, n content hashes) of the lines that are not blank."""
    ends: list[np.ndarray] = []
    position = 0
    while chunk := os.pread(handle, _CHUNK, position):
        ends.append(np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10) + position)
        position += len(chunk)
    stops = np.concatenate([*ends, [position]]).astype(np.int64)
    starts = np.concatenate([[0], stops[:-1] + 1]).astype(np.int64)
    if os.pread(handle, 3, 0) == b"\xef\xbb\xbf":  # a byte order mark
        starts[0] = 3
    kept, hashes = [], []
    for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist())):
        # A line beyond the limit is known by its beginning and its length.
        line = os.pread(handle, min(stop - start, MAX_RECORD), start).strip()
        if line:
            kept.append(row)
            hashes.append(stable_id(line, b"" if stop - start <= MAX_RECORD else str(stop - start)))
    picked = np.asarray(kept, np.int64)
    return np.stack([starts, stops], axis=1)[picked], picked + 1, hashes
