"""One JSON file that holds everything: an array of samples (LLaVA's data), or the captions of COCO.

The file is parsed once, its samples go as lines into an unnamed temporary file, and from there it is JSON lines.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlm.config.errors import DataError
from vlm.data.sources.json_lines import JsonLinesSource, open_plain
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

MAX_FILE = 2 * 1024**3
"""Bytes of a file, unpacked; a larger one is refused: it is held in memory once."""
_KINDS = {"conversations": "LLaVA conversations (JSON array)", "messages": "chat messages (JSON array)"}


class JsonArraySource(JsonLinesSource):
    """The entries of some files, numbered from 1. kind: which form they have."""

    def __init__(self, paths: Sequence[str], limits: PictureLimits = DEFAULT_LIMITS) -> None:
        self._forms: list[str] = []
        self._folder = ""
        super().__init__(paths, limits)
        if len(set(self._forms)) > 1:
            raise DataError(f"files of several forms: {', '.join(sorted(set(self._forms)))}", where=",".join(paths))
        self.kind = self._forms[0]
        if self._folder:
            self.root = os.path.normpath(os.path.join(self.root, self._folder))
            self._reader.root = self.root

    def _opened(self, path: str) -> int:
        whole = parsed(path)
        if isinstance(whole, list):
            first = next((entry for entry in whole if isinstance(entry, dict)), {})
            self._forms.append(next((kind for field, kind in _KINDS.items() if field in first), "JSON array"))
            return _lines(iter(whole))
        if isinstance(whole, dict) and isinstance(whole.get("images"), list) and isinstance(whole.get("annotations"), list):
            self._forms.append("COCO captions")
            samples = list(coco_samples(whole, path))
            folder = picture_folder(path, next((s["image"] for s in samples), ""))
            if "COCO captions" in self._forms[:-1] and folder != self._folder:
                raise DataError("the pictures lie in another folder than those of the first file", where=path)
            self._folder = folder
            return _lines(iter(samples))
        raise DataError(
            "neither an array of samples nor the captions of COCO (images and annotations)",
            where=path,
            remedy="JSON lines end in .jsonl; `vlm data inspect` shows what a source holds",
        )

    def describe(self) -> Mapping[str, Any]:
        pictures = {"pictures": self.root} if self._folder else {}
        return {**super().describe(), **pictures}


def parsed(path: str) -> Any:
    """The JSON value of a file, plain or gzipped. Raises DataError when it is too large or not JSON."""
    handle = open_plain(path)
    try:
        size = os.fstat(handle).st_size
        if size > MAX_FILE:
            raise DataError(f"{size} bytes, expected at most {MAX_FILE}", where=path, remedy="write it as JSON lines")
        parts, at = [], 0
        while part := os.pread(handle, 1 << 24, at):
            parts.append(part)
            at += len(part)
    finally:
        os.close(handle)
    try:
        return json.loads(b"".join(parts).decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8: {error}", where=path) from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {str(error)[:200]}", where=path, remedy="one value a line is JSON lines (.jsonl)") from error


def _lines(entries: Iterator[Any]) -> int:
    """A descriptor of an unnamed file with one entry a line."""
    with tempfile.TemporaryFile() as file:
        for entry in entries:
            file.write(json.dumps(entry).encode() + b"\n")
        file.flush()
        return os.dup(file.fileno())


def coco_samples(whole: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    """One sample a picture, in the order of `images`: `image` (file name), `image_id`, `captions`, `caption` (the first).

    Raises DataError for an entry that is not of COCO's form.
    """
    captions: dict[Any, list[str]] = {}
    for number, entry in enumerate(whole["annotations"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str) or not isinstance(entry.get("image_id"), int | str):
            raise DataError(
                "expected image_id and caption",
                where=f"{path}: annotations[{number}]",
                remedy="boxes and key points have no captions; use the file captions_*.json",
            )
        captions.setdefault(entry["image_id"], []).append(entry["caption"].strip())
    for number, entry in enumerate(whole["images"]):
        if not isinstance(entry, dict) or not isinstance(entry.get("file_name"), str) or "id" not in entry:
            raise DataError("expected id and file_name", where=f"{path}: images[{number}]")
        own = captions.get(entry["id"], []) if isinstance(entry["id"], int | str) else []
        sample = {"image": entry["file_name"], "image_id": entry["id"], "captions": own}
        yield {**sample, "caption": own[0]} if own else sample


def picture_folder(path: str, name: str) -> str:
    """Where the pictures of a COCO file lie, relative to its folder: the first usual place that holds `name`, or ''.

    `annotations/captions_val2017.json` usually stands beside a folder `val2017`.
    """
    stem = os.path.basename(path).removesuffix(".gz").removesuffix(".json")
    split = stem.removeprefix("captions_")
    here = os.path.dirname(os.path.abspath(path))
    places = ["", "images", split, f"images/{split}", "..", "../images", f"../{split}", f"../images/{split}"]
    return next((place for place in places if name and os.path.isfile(os.path.join(here, place, name))), "")
