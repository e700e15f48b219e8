"""Where every key of a TOML text stands, so that an error can name line and column.

`tomllib` gives values without positions. This scanner walks a text that `tomllib` has already accepted and notes the
position of each key path; it never decides what a value is. Paths are tuples of keys and list indices:
`("objectives", 0, "weight")`. Lines and columns count from 1, columns in characters.
"""

from __future__ import annotations

import tomllib
from bisect import bisect_right
from contextlib import suppress
from dataclasses import dataclass

Path = tuple[str | int, ...]

_BLANK = " \t"
_VALUE_END = ",]}#\n"
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")


@dataclass(frozen=True)
class Position:
    """Of a key and of its value. A list entry has no key: both are its value's; a table's value is its header."""

    line: int
    column: int
    value_line: int
    value_column: int


def scan(text: str) -> dict[Path, Position]:
    """Positions of every key path in `text`, which must be valid TOML; anything else gives a partial map."""
    scanner = _Scanner(text)
    with suppress(IndexError, ValueError):  # a text that ends early or has a bad key is not TOML; what was seen stands
        scanner.document()
    return scanner.found


def parse_key(text: str) -> tuple[tuple[str, ...], int]:
    """The dotted key at the start of `text` and the offset behind it, as in `train."a.b".lr = 1`.

    Raises ValueError when there is no key.
    """
    scanner = _Scanner(text)
    try:
        parts = scanner.key()
    except IndexError:
        raise ValueError(f"{text!r} is no key") from None
    if not parts or not all(part or quoted for part, _, quoted in parts):
        raise ValueError(f"{text!r} is no key")
    return tuple(part for part, _, _ in parts), scanner.at


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text.replace("\r\n", "\n") + "\n"
        self.at = 0
        self.found: dict[Path, Position] = {}
        self.counts: dict[Path, int] = {}  # entries so far of each array of tables
        self.starts = [0, *(i + 1 for i, c in enumerate(self.text) if c == "\n")]

    def place(self, at: int) -> tuple[int, int]:
        line = bisect_right(self.starts, at)
        return line, at - self.starts[line - 1] + 1

    def note(self, path: Path, key_at: int, value_at: int) -> None:
        if path not in self.found:
            self.found[path] = Position(*self.place(key_at), *self.place(value_at))

    def skip(self, over: str = _BLANK) -> None:
        """Past blanks; with a newline in `over`, past lines and comments too."""
        while self.at < len(self.text):
            c = self.text[self.at]
            if c in over:
                self.at += 1
            elif c == "#" and "\n" in over:
                self.at = self.text.index("\n", self.at) if "\n" in self.text[self.at :] else len(self.text)
            else:
                return

    def document(self) -> None:
        prefix: Path = ()
        while True:
            self.skip(_BLANK + "\n")
            if self.at >= len(self.text):
                return
            if self.text[self.at] == "[":
                prefix = self.header()
            else:
                self.pair(prefix)

    def header(self) -> Path:
        opening = self.at
        many = self.text.startswith("[[", self.at)
        self.at += 2 if many else 1
        parts = self.key()
        self.at += 2 if many else 1  # the closing brackets
        path: Path = ()
        for i, (name, key_at, _) in enumerate(parts):
            path = (*path, name)
            last = i == len(parts) - 1
            self.note(path, key_at, opening)
            if last and many:
                index = self.counts.get(path, 0)
                self.counts[path] = index + 1
                path = (*path, index)
                self.note(path, key_at, opening)
            elif path in self.counts:
                path = (*path, self.counts[path] - 1)
            elif last:  # a table made implicitly by `[a.b]` is at home at its own header `[a]`
                self.found[path] = Position(*self.place(key_at), *self.place(opening))
        return path

    def key(self) -> list[tuple[str, int, bool]]:
        """The parts of a dotted key as (name, offset, quoted); stops behind the last one and its blanks."""
        parts = []
        while True:
            self.skip()
            start = self.at
            quote = self.text[self.at]
            if quote in "\"'":
                self.string()
                raw = self.text[start : self.at]
                try:
                    name = next(iter(tomllib.loads(f"{raw} = 0")))
                except tomllib.TOMLDecodeError:
                    raise ValueError(f"{raw} is no key") from None
            else:
                while self.text[self.at] in _BARE:
                    self.at += 1
                name = self.text[start : self.at]
            parts.append((name, start, quote in "\"'"))
            self.skip()
            if self.text[self.at] != ".":
                return parts
            self.at += 1

    def pair(self, prefix: Path) -> None:
        parts = self.key()
        self.at += 1  # the equals sign
        self.skip()
        value_at = self.at
        path = prefix
        for name, key_at, _ in parts:
            path = (*path, name)
            self.note(path, key_at, value_at)
        self.value(path)

    def value(self, path: Path) -> None:
        c = self.text[self.at]
        if c in "\"'":
            self.string()
        elif c == "[":
            self.at += 1
            index = 0
            while True:
                self.skip(_BLANK + "\n,")
                if self.text[self.at] == "]":
                    break
                self.note((*path, index), self.at, self.at)
                self.value((*path, index))
                index += 1
            self.at += 1
        elif c == "{":
            self.at += 1
            while True:
                self.skip(_BLANK + "\n,")
                if self.text[self.at] == "}":
                    break
                self.pair(path)
            self.at += 1
        else:
            start = self.at
            while self.text[self.at] not in _VALUE_END:
                self.at += 1
            if self.at == start:  # no value where one must be: not TOML
                raise IndexError

    def string(self) -> None:
        quote = self.text[self.at]
        if self.text.startswith(quote * 3, self.at):
            self.at += 3
            while not self.text.startswith(quote * 3, self.at):
                self.at += 2 if self.text[self.at] == "\\" and quote == '"' else 1
                if self.at >= len(self.text):
                    raise IndexError
            self.at += 3
            for _ in range(2):  # up to two quotes may stand directly before the closing three
                if self.text.startswith(quote, self.at):
                    self.at += 1
        else:
            self.at += 1
            while self.text[self.at] != quote:
                self.at += 2 if self.text[self.at] == "\\" and quote == '"' else 1
            self.at += 1
