"""One address for every source: what it is, is detected and said.

`shards/{00000..00014}.tar`, `data/val-*.tar`, `wds:...` (WebDataset); a folder of pictures; `pairs.jsonl`,
`text.jsonl.gz`; a JSON array (LLaVA's conversations) or a captions file of COCO (`.json`); a table with a header (`.csv`, `.tsv`);
`scenes:?n=20000&seed=1&split=val&size=64`, `digits:?n=20000&length=4&width=128&height=64`, `clips:?n=20000&frames=8&size=32`
(drawn). A prefix (`wds:`, `folder:`, `jsonl:`, `json:`, `csv:`) settles what the ending does not say. Several addresses of one kind are
joined by commas.
"""

from __future__ import annotations

import glob
import os
import re

from vlm.config.errors import DataError
from vlm.config.nearest import did_you_mean
from vlm.data.scenes.clips_source import ClipsSource
from vlm.data.scenes.digits_source import DigitsSource
from vlm.data.scenes.drawn import DrawnSource
from vlm.data.scenes.source import ScenesSource
from vlm.data.sources.base import Source
from vlm.data.sources.folder import FolderSource
from vlm.data.sources.json_array import JsonArraySource
from vlm.data.sources.json_lines import JsonLinesSource
from vlm.data.sources.tables import TableSource
from vlm.data.sources.webdataset import WebDatasetSource
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

_NAMES = ("wds", "webdataset", "folder", "jsonl", "json", "csv", "text", "scenes", "digits", "clips")
_PREFIX = re.compile(rf"^({'|'.join(_NAMES)}):(?!//)")
_DRAWN: dict[str, type[DrawnSource]] = {source.name: source for source in (ScenesSource, DigitsSource, ClipsSource)}
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_FILES = 100_000
_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")
_KNOWN = (
    "a tar shard (.tar), a folder of pictures, JSON lines (.jsonl, .jsonl.gz), a JSON array or COCO captions (.json), "
    "a table (.csv, .tsv), scenes:, digits: or clips:"
)


def open_source(uri: str, limits: PictureLimits = DEFAULT_LIMITS) -> Source:
    """The source at an address. Raises DataError that names what is missing or cannot be told."""
    if not uri.strip():
        raise DataError("the address of the data is empty", remedy=f"expected {_KNOWN}")
    found = _PREFIX.match(uri)
    prefix = found.group(1) if found else None
    rest = uri[found.end() :] if found else uri
    if prefix in _DRAWN:
        return _DRAWN[prefix].from_uri(uri)
    remote = re.match(r"^([a-z][a-z0-9+.-]*)://|^pipe:", rest)
    if remote:
        raise DataError(
            "remote addresses and commands are not read",
            where=uri,
            remedy="download the data and name the files",
        )
    files = expand(rest)
    if prefix is None:
        prefix = _detect(files, uri)
    source: Source
    if prefix in ("wds", "webdataset"):
        if len(files) == 1 and os.path.isdir(files[0]):
            files = _inside(files[0], ".tar")
        source = WebDatasetSource(files, limits)
    elif prefix == "folder":
        if len(files) != 1 or not os.path.isdir(files[0]):
            raise DataError(f"expected one folder, found {len(files)} files", where=uri)
        source = FolderSource(files[0], limits)
    elif prefix == "json":
        source = JsonArraySource(files, limits)
    elif prefix == "csv":
        source = TableSource(files, limits)
    else:
        source = JsonLinesSource(files, limits)
    if not len(source):
        raise DataError(f"{source.kind}: no samples", where=uri)
    return source


def expand(pattern: str) -> list[str]:
    """The files that a pattern names: commas, braces (`{00000..00014}`, `{a,b}`), globs; each must exist.

    Raises DataError that names the missing ones.
    """
    files: list[str] = []
    for part in _commas(pattern):
        for name in _braces(os.path.expanduser(part)):
            if os.path.exists(name):
                files.append(name)
            elif any(c in name for c in "*?["):
                matches = sorted(glob.glob(name))
                if not matches:
                    said = f"no file matches this pattern{_prefix_meant(name)}"
                    raise DataError(said, where=name, remedy=f"relative paths start at {os.getcwd()}")
                files += matches
            else:
                files.append(name)
    missing = [name for name in files if not os.path.exists(name)]
    if missing and len(files) == 1:
        remedy = f"expected {_KNOWN}; relative paths start at {os.getcwd()}"
        raise DataError(f"does not exist{_prefix_meant(missing[0])}", where=pattern, remedy=remedy)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise DataError(
            f"{len(missing)} of {len(files)} files do not exist: {shown}",
            where=pattern,
            remedy=f"expected {_KNOWN}; relative paths start at {os.getcwd()}",
        )
    if len(files) > _MAX_FILES:
        raise DataError(f"{len(files)} files, expected at most {_MAX_FILES}", where=pattern)
    return files


def _prefix_meant(name: str) -> str:
    """The prefix that a misspelt one is nearest to, as the end of a message."""
    word = re.match(r"^(\w+):", name)
    return did_you_mean(word[1], _NAMES, end=":") if word else ""


def _commas(text: str) -> list[str]:
    """The parts between commas outside braces; a file whose name has a comma is one part."""
    if os.path.exists(text):
        return [text]
    parts, depth, current = [], 0, ""
    for char in text:
        depth += (char == "{") - (char == "}")
        if char == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += char
    return [part for part in (*parts, current) if part]


def _braces(text: str) -> list[str]:
    found = _BRACES.search(text)
    if not found or os.path.exists(text):
        return [text]
    body = found.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if span:
        first, last = span.groups()
        low, high = int(first), int(last)
        if abs(high - low) >= _MAX_FILES:
            raise DataError(
                f"{{{body}}} names {abs(high - low) + 1} files, expected at most {_MAX_FILES}", where=text
            )
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        step = 1 if high >= low else -1
        choices = [str(n).zfill(width) for n in range(low, high + step, step)]
    else:
        choices = body.split(",")
    head, tail = text[: found.start()], text[found.end() :]
    return [head + choice + rest for choice in choices for rest in _braces(tail)]


def _inside(folder: str, ending: str) -> list[str]:
    return sorted(
        entry.path for entry in os.scandir(folder) if entry.name.endswith(ending) and entry.is_file()
    )


def _detect(files: list[str], uri: str) -> str:
    if len(files) == 1 and os.path.isdir(files[0]):
        return "wds" if _inside(files[0], ".tar") else "folder"
    folders = [name for name in files if os.path.isdir(name)]
    if folders:
        raise DataError(
            f"{folders[0]} is a folder among files", where=uri, remedy="name one folder, or files"
        )
    if all(name.lower().endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")) for name in files):
        return "jsonl"
    if all(name.lower().endswith((".json", ".json.gz")) for name in files):
        return "json"
    if all(name.lower().endswith(_TABLES) for name in files):
        return "csv"
    if all(name.lower().endswith(".tar") for name in files):
        return "wds"
    odd = next(n for n in files if not n.lower().endswith((".tar", ".jsonl", ".jsonl.gz", ".json", ".json.gz", *_TABLES)))
    if odd.lower().endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
        raise DataError(
            "the archive is compressed", where=odd, remedy="decompress it: samples are read from its middle"
        )
    if odd.lower().endswith((".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".npz", ".ckpt")):
        raise DataError(
            "this kind of file may hold a pickle, which is never read",
            where=odd,
            remedy="convert it to WebDataset tar shards or JSON lines with the program that wrote it",
        )
    raise DataError("what this is cannot be told from its name", where=odd, remedy=f"expected {_KNOWN}")
