"""Readers: from a recipe (where a sample lies) to its fields.

A reader is built from a small JSON value, a recipe is one too: worker processes get both over a pipe and need
neither the index of the source nor torch.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

from vlm.data.samples import BadSample
from vlm.runtime.pictures import BadPicture, PictureLimits, read_file

PICTURE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"))
PICKLE_EXTENSIONS = frozenset(("pkl", "pickle", "pyd", "pt", "pth", "ckpt", "joblib", "bin", "dill"))
MAX_RECORD = 16 * 1024 * 1024
"""Bytes of a JSON or text record."""
_OPEN_FILES = 64


class Reader(Protocol):
    """read: the fields of the sample that a recipe names; fields: the same without its picture, cheaper.

    Both raise BadSample or BadPicture.
    """

    def read(self, recipe: Any) -> dict[str, Any]: ...

    def fields(self, recipe: Any) -> dict[str, Any]: ...


def open_reader(spec: dict[str, Any], limits: PictureLimits) -> Reader:
    """The reader that `Source.spec()` describes."""
    kind = spec["kind"]
    if kind == "tar":
        return TarReader(spec["shards"], limits)
    if kind == "folder":
        return FolderReader(spec["root"], limits)
    if kind == "jsonl":
        return JsonLinesReader(spec["root"], limits)
    if kind == "scenes":
        from vlm.data.scenes.reader import SceneReader

        return SceneReader(spec)
    if kind == "digits":
        from vlm.data.scenes.digits import DigitsReader

        return DigitsReader(spec)
    if kind == "clips":
        from vlm.data.scenes.clips import ClipsReader

        return ClipsReader(spec)
    if kind == "mixture":
        return MixedReader([open_reader(part, limits) for part in spec["parts"]])
    raise ValueError(f"no reader of kind {kind!r}")


class MixedReader:
    """Recipe: [number of the source, its recipe]."""

    def __init__(self, parts: list[Reader]) -> None:
        self.parts = parts

    def read(self, recipe: Any) -> dict[str, Any]:
        return self.parts[recipe[0]].read(recipe[1])

    def fields(self, recipe: Any) -> dict[str, Any]:
        return self.parts[recipe[0]].fields(recipe[1])


def parse_object(raw: bytes | str) -> dict[str, Any]:
    """A JSON object. Raises BadSample."""
    try:
        value = json.loads(raw)
    except UnicodeDecodeError as error:
        raise BadSample("bad_encoding", str(error)[:100]) from None
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)[:100]) from None
    if not isinstance(value, dict):
        raise BadSample("bad_json", f"a {type(value).__name__} where an object was expected")
    return value


def decode_text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("bad_encoding", str(error)[:100]) from None


class TarReader:
    """Recipe: [shard, problem or None, [extension, offset, size], ...]; members are read in place."""

    def __init__(self, shards: list[str], limits: PictureLimits) -> None:
        self.shards = shards
        self.limits = limits
        self._files: OrderedDict[int, int] = OrderedDict()

    def _handle(self, shard: int) -> int:
        handle = self._files.get(shard)
        if handle is None:
            try:
                handle = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise BadSample("unreadable", f"{self.shards[shard]}: {error.strerror}") from error
            self._files[shard] = handle
            if len(self._files) > _OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        else:
            self._files.move_to_end(shard)
        return handle

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        data = os.pread(self._handle(shard), size, offset)
        while len(data) < size:  # one call may return less; nothing more means that the file was cut
            more = os.pread(self._handle(shard), size - len(data), offset + len(data))
            if not more:
                raise BadSample("truncated_archive")
            data += more
        return data

    def fields(self, recipe: Any) -> dict[str, Any]:
        shard, problem, *members = recipe
        return self.read(
            [shard, problem, *(m for m in members if m[0].rpartition(".")[2] not in PICTURE_EXTENSIONS)]
        )

    def read(self, recipe: Any) -> dict[str, Any]:
        shard, problem, *members = recipe
        if problem:
            raise BadSample(problem)
        fields: dict[str, Any] = {}
        picture: bytes | None = None
        for extension, offset, size in members:
            last = extension.rpartition(".")[2]
            if last in PICKLE_EXTENSIONS:
                raise BadSample("pickle", extension)
            if last in PICTURE_EXTENSIONS:
                if size > self.limits.max_bytes:
                    raise BadPicture("too_many_bytes", f"{size} > {self.limits.max_bytes}")
                data = self._bytes(shard, offset, size)
                fields[extension] = data
                picture = picture or data
            elif last in ("json", "txt", "text", "caption", "cls"):
                if size > MAX_RECORD:
                    raise BadSample("text_too_long", f"{size} > {MAX_RECORD} bytes")
                data = self._bytes(shard, offset, size)
                if last == "json":
                    fields = {**parse_object(data), **fields}
                else:
                    fields[extension] = decode_text(data)
        if picture is not None:
            fields["image"] = picture  # also where the JSON has an `image` of its own, a file name
        return fields

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


class FolderReader:
    """Recipe: [picture or None, caption file or None, class or None], paths below the root."""

    def __init__(self, root: str, limits: PictureLimits) -> None:
        self.root = root
        self.limits = limits

    def fields(self, recipe: Any) -> dict[str, Any]:
        return self.read([None, *recipe[1:]])

    def read(self, recipe: Any) -> dict[str, Any]:
        picture, caption, label = recipe
        fields: dict[str, Any] = {}
        if picture is not None:
            fields["image"] = read_file(os.path.join(self.root, picture), self.limits.max_bytes)
        if caption is not None:
            fields["txt"] = decode_text(read_file(os.path.join(self.root, caption), MAX_RECORD))
        if label is not None:
            fields["category"] = label
            fields["name"] = Path(label).name.replace("_", " ")
        return fields


class JsonLinesReader:
    """Recipe: [line or None, problem, [problem, detail] or None]. A picture is a path beside the file, or a data URI."""

    def __init__(self, root: str, limits: PictureLimits) -> None:
        self.root = root
        self.limits = limits

    def fields(self, recipe: Any) -> dict[str, Any]:
        return self.read(recipe)

    def read(self, recipe: Any) -> dict[str, Any]:
        line, problem = recipe
        if problem:
            raise BadSample(*([problem] if isinstance(problem, str) else problem))
        return parse_object(line)

    def picture(self, value: Any) -> bytes:
        """The encoded bytes of the picture that a field names."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if not isinstance(value, str) or not value:
            raise BadSample("missing_image", f"a {type(value).__name__} where a path was expected")
        if value.startswith("data:"):
            head, _, body = value.partition(",")
            if len(body) * 3 // 4 > self.limits.max_bytes + 3:
                raise BadPicture("too_many_bytes", f"{len(body) * 3 // 4} > {self.limits.max_bytes}")
            try:
                if not head.endswith(";base64"):
                    raise ValueError("not base64")
                return base64.b64decode(body, validate=True)
            except (binascii.Error, ValueError) as error:
                raise BadPicture("damaged", f"data URI: {error}") from None
        if "://" in value[:12]:
            raise BadSample("remote", value[:80])
        try:
            return read_file(os.path.join(self.root, value), self.limits.max_bytes)
        except BadPicture as error:
            if error.reason == "unreadable":
                raise BadSample("missing_image", f"{value[:200]}: {error.detail}") from None
            raise
