"""Index of a tar file: where each member lies, found by one bounded scan of the headers.

Nothing is extracted. Names are checked, links, devices and sparse members are refused, and what is wrong with an
archive becomes a refused sample of its own, so that it is counted and named like any other.
"""

from __future__ import annotations

import os
import re
import zlib
from array import array
from dataclasses import dataclass

import numpy as np

from vlm.config.errors import DataError

MAX_MEMBERS = 1 << 22
"""Members of one archive; a larger one is refused (split it into shards)."""
_BLOCK = 512
_MAX_NAME = 4096
_MAX_PAX = 1 << 20
_WINDOW = 1 << 16
_META = re.compile(r"^(__.*__|__MACOSX)$")
_PAX_PATH = re.compile(rb"\d+ path=([^\n]*)\n")


@dataclass(frozen=True)
class TarIndex:
    """Samples of one archive: members that share a name up to the first dot of its last part.

    keys[s]: name of sample s. Its members are start[s]..start[s+1] of `extension` (index into `extensions`),
    `offset` and `size` (bytes). problems: sample -> reason for refusing it.
    """

    path: str
    keys: list[str]
    start: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    extensions: list[str]
    problems: dict[int, str]

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> list[tuple[str, int, int]]:
        """(extension, offset, size) of each member of a sample."""
        a, b = int(self.start[sample]), int(self.start[sample + 1])
        return [
            (self.extensions[e], o, s)
            for e, o, s in zip(self.extension[a:b], self.offset[a:b].tolist(), self.size[a:b].tolist())
        ]


class _Builder:
    def __init__(self) -> None:
        self.keys: list[str] = []
        self.number: dict[str, int] = {}
        self.problems: dict[int, str] = {}
        self.extensions: dict[str, int] = {}
        self.rows = array("q")

    def sample(self, key: str) -> int:
        found = self.number.get(key)
        if found is None:
            found = self.number[key] = len(self.keys)
            self.keys.append(key)
        return found

    def problem(self, key: str, reason: str) -> None:
        self.problems.setdefault(self.sample(key), reason)

    def add(self, key: str, extension: str, offset: int, size: int) -> None:
        number = self.extensions.setdefault(extension, len(self.extensions))
        self.rows.extend((self.sample(key), number, offset, size))

    def finish(self, path: str) -> TarIndex:
        rows = np.frombuffer(self.rows, np.int64).reshape(-1, 4) if self.rows else np.zeros((0, 4), np.int64)
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
        pairs, counts = np.unique(rows[:, 0] * max(1, len(self.extensions)) + rows[:, 1], return_counts=True)
        for pair in pairs[counts > 1]:
            self.problems.setdefault(int(pair) // len(self.extensions), "duplicate_member")
        start = np.searchsorted(rows[:, 0], np.arange(len(self.keys) + 1))
        return TarIndex(
            path=path,
            keys=self.keys,
            start=start,
            extension=rows[:, 1].astype(np.int32),
            offset=rows[:, 2].copy(),
            size=rows[:, 3].copy(),
            extensions=list(self.extensions),
            problems=self.problems,
        )


def scan_tar(path: str) -> TarIndex:
    """The index of one uncompressed archive. Raises DataError when the file cannot be read or is not a tar file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"cannot be opened: {error.strerror}", where=path) from error
    try:
        return _scan(handle, path)
    finally:
        os.close(handle)


def _scan(handle: int, path: str) -> TarIndex:
    end = os.fstat(handle).st_size
    builder = _Builder()
    window, window_at = b"", 0
    position, members = 0, 0
    long_name: str | None = None
    pax_sparse = False
    while position < end:
        if position < window_at or position + _BLOCK > window_at + len(window):
            window, window_at = os.pread(handle, _WINDOW, position), position
        header = window[position - window_at : position - window_at + _BLOCK]
        if len(header) < _BLOCK:
            if position == 0:
                _refuse_first(path, header)
            builder.problem(f"<end at byte {position}>", "truncated_archive")
            break
        if header[0] == 0 and not any(header):
            break
        size = _number(header[124:136])
        if not _checksum_fits(header) or size is None:
            if position == 0:
                _refuse_first(path, header)
            builder.problem(f"<byte {position}>", "damaged_archive")
            break
        members += 1
        if members > MAX_MEMBERS:
            raise DataError(
                f"more than {MAX_MEMBERS} members", where=path, remedy="split the archive into several shards"
            )
        kind = header[156:157]
        data = position + _BLOCK
        if kind == b"S":  # old GNU sparse: more header blocks may follow
            extended = header[482]
            while extended and data < end:
                block = os.pread(handle, _BLOCK, data)
                data += _BLOCK
                extended = len(block) == _BLOCK and block[504]
        position = data + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        cut = data + size > end
        if kind in b"LxgK" and kind:
            limit = _MAX_PAX if kind in b"xg" else _MAX_NAME + 1
            if cut or size > limit:
                builder.problem(f"<byte {data - _BLOCK}>", "truncated_archive" if cut else "bad_name")
                if cut:
                    break
                long_name = None
            elif kind == b"L":
                long_name = _text(os.pread(handle, size, data).rstrip(b"\0"))
            elif kind == b"x":
                record = os.pread(handle, size, data)
                found = _PAX_PATH.search(record)
                if found:
                    long_name = _text(found.group(1))
                pax_sparse = b" GNU.sparse." in record
            continue
        name = long_name if long_name is not None else _name(header)
        long_name = None
        _take(builder, name, kind, pax_sparse or kind == b"S", data, size, cut)
        pax_sparse = False
        if cut:
            break
    else:
        if position > end:  # the padding of the last member is cut: what followed it is lost
            builder.problem(f"<end at byte {end}>", "truncated_archive")
    return builder.finish(path)


def _take(builder: _Builder, name: str, kind: bytes, sparse: bool, offset: int, size: int, cut: bool) -> None:
    """Put one member into the index, or what is wrong with it."""
    if kind in (b"5", b"V", b"D"):
        return
    if not _safe(name):
        builder.problem(name.encode("unicode_escape").decode()[:200] or "<no name>", "bad_name")
        return
    name = name.removeprefix("./")
    folder, _, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or _META.match(base) or (folder and _META.match(folder.split("/")[0])):
        return
    key = f"{folder}/{stem}" if folder else stem
    if cut:
        builder.problem(key, "truncated_archive")
    elif sparse:
        builder.problem(key, "sparse")
    elif kind in (b"1", b"2"):
        builder.problem(key, "link")
    elif kind not in (b"0", b"\0", b"7"):
        builder.problem(key, "device")
    elif dot:
        builder.add(key, extension.lower(), offset, size)


def _safe(name: str) -> bool:
    parts = name.split("/")
    return (
        bool(name) and len(name) <= _MAX_NAME and name[0] != "/" and ".." not in parts and name.isprintable()
    )


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "backslashreplace")


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            name = prefix + b"/" + name
    return _text(name)


def _number(field: bytes) -> int | None:
    """A size field: octal digits, or base 256 behind a set high bit; None when it is neither or negative."""
    if field[0] & 0x80:
        return None if field[0] & 0x40 else int.from_bytes(bytes([field[0] & 0x3F]) + field[1:], "big")
    digits = field.strip(b"\0 ")
    if not digits:
        return 0
    try:
        return int(digits, 8)
    except ValueError:
        return None


def _checksum_fits(header: bytes) -> bool:
    """Whether the stated sum of bytes is right. Adler-32's lower half is that sum plus one, modulo 65521."""
    try:
        stated = int(header[148:156].strip(b"\0 ") or b"x", 8)
    except ValueError:
        return False
    return zlib.adler32(header[:148] + b" " * 8 + header[156:]) & 0xFFFF == (stated + 1) % 65521


def _refuse_first(path: str, header: bytes) -> None:
    packed = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}
    for magic, name in packed.items():
        if header.startswith(magic):
            raise DataError(
                f"the archive is compressed with {name}",
                where=path,
                remedy="decompress it: samples are read from the middle of an archive",
            )
    raise DataError("not a tar file: the first header is damaged", where=path)
