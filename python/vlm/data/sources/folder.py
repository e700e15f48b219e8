"""A folder of pictures: with caption files beside them, with a folder for each class, or neither."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from vlm.config.errors import DataError
from vlm.data.samples import Sample, distinct, stable_id
from vlm.data.sources.readers import PICTURE_EXTENSIONS, FolderReader
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits

Entry = tuple[str | None, str | None, str | None]


class FolderSource:
    """Pictures below a folder in the order of their paths; links to folders are not followed.

    If any `NAME.txt` lies beside a picture `NAME.*`, captions are expected for all, and a picture or a caption
    without its other half is a refused sample. Otherwise the folder of a picture is its class: `category` is the
    path of that folder, `name` its last part as words.
    """

    def __init__(self, root: str, limits: PictureLimits = DEFAULT_LIMITS) -> None:
        self.root = os.path.abspath(root)
        self._reader = FolderReader(self.root, limits)
        pictures: list[str] = []
        texts: dict[str, str] = {}
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            below = os.path.relpath(folder, self.root)
            for name in sorted(files):
                _stem, _, extension = name.rpartition(".")
                path = name if below == "." else f"{below}/{name}"
                if name.startswith("."):
                    continue
                if extension.lower() in PICTURE_EXTENSIONS:
                    pictures.append(path)
                elif extension.lower() == "txt":
                    texts[path[: len(path) - 4]] = path
        if not pictures:
            raise DataError(
                "no pictures found (looked for " + ", ".join(sorted(PICTURE_EXTENSIONS)) + ")", where=root
            )
        stems = {path.rpartition(".")[0] for path in pictures}
        captioned = not stems.isdisjoint(texts)
        classed = not captioned and any("/" in path for path in pictures)
        self._entries: list[Entry] = []
        for path in pictures:
            label = os.path.dirname(path) if classed else None
            self._entries.append(
                (path, texts.get(path.rpartition(".")[0]) if captioned else None, label or None)
            )
        if captioned:
            self._entries += [(None, path, None) for stem, path in sorted(texts.items()) if stem not in stems]
        self.kind = (
            "folder of pictures with caption files"
            if captioned
            else "folder of pictures by class"
            if classed
            else "folder of pictures without text"
        )
        self._name = os.path.basename(self.root)
        self.ids = distinct(np.asarray([stable_id(p or t or "") for p, t, _ in self._entries], np.int64))

    def __len__(self) -> int:
        return len(self._entries)

    def key(self, index: int) -> str:
        picture, caption, _ = self._entries[index]
        return f"{self._name}:{picture or caption}"

    def recipe(self, index: int) -> Any:
        return list(self._entries[index])

    def spec(self) -> dict[str, Any]:
        return {"kind": "folder", "root": self.root}

    def read(self, index: int) -> Sample:
        return Sample(self.key(index), self._reader.read(self.recipe(index)))

    def describe(self) -> Mapping[str, Any]:
        classes = {label for _, _, label in self._entries if label}
        return {"kind": self.kind, "samples": len(self), "files": len(self), "classes": len(classes) or None}
