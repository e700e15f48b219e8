"""Decode one sample: fields to pixels and texts. Runs in the main process or in a worker, and imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vlm.data.augment import augmented
from vlm.data.captions import choose
from vlm.data.samples import BadSample, field_at, group_id
from vlm.data.sources.readers import JsonLinesReader, open_reader
from vlm.runtime.pictures import BadPicture, PictureLimits, decode_picture
from vlm.runtime.preprocess import Preprocess

AUTO_IMAGE = ("image", "picture", "file_name", "filepath", "image_path")
"""Fields that hold the picture where the options do not say."""


@dataclass(frozen=True)
class Job:
    """One sample to decode: where it lies, and the keys of its draws."""

    recipe: Any
    image_key: int = 0
    caption_key: int = 0


@dataclass(frozen=True)
class Decoded:
    """A good sample (reason is empty) or the reason why it is bad.

    pixels: uint8 [3, S, S] or None. texts: by slot, None where a slot is empty. label: class. extra: fields that JSON can say, where they are asked for.
    """

    reason: str = ""
    detail: str = ""
    pixels: np.ndarray | None = None
    texts: list[str | None] = field(default_factory=list)
    group: int | None = None
    label: int | None = None
    extra: dict[str, Any] | None = None


class Decoder:
    """Built from one JSON value, so that a worker can build the same.

    spec: `source` (of the reader), `limits`, `preprocess` (fields of Preprocess or None), `image` (ImageOptions),
    `captions`, `columns`, `max_text`, `group_by`, `label`, `classes`, `texts` (whether texts are asked for), `train`, `extra`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.limits = PictureLimits(**spec["limits"])
        self.reader = open_reader(spec["source"], self.limits)
        made = spec["preprocess"]
        self.preprocess = (
            Preprocess(**{**made, "mean": tuple(made["mean"]), "std": tuple(made["std"])}) if made else None
        )
        self._classes = {name: number for number, name in enumerate(spec["classes"])}
        image = spec["image"]
        self._varies = spec["train"] and (image["augment"] != "none" or image["flip"])

    def decode(self, job: Job) -> Decoded:
        """Never raises for what a sample may hold: a bad one gives its reason."""
        try:
            return self._decode(job)
        except (BadSample, BadPicture) as error:
            return Decoded(reason=error.reason, detail=error.detail)
        except (MemoryError, RecursionError) as error:
            return Decoded(reason="damaged", detail=type(error).__name__)

    def _decode(self, job: Job) -> Decoded:
        spec = self.spec
        fields = self.reader.read(job.recipe)
        texts: list[str | None] = []
        if spec["texts"]:
            texts = choose(
                fields, spec["columns"]["text"], spec["captions"], spec["max_text"], job.caption_key
            )
        group = None
        if spec["group_by"]:
            value = texts[0] if spec["group_by"] == "text" else field_at(fields, spec["group_by"])
            if value is None:
                raise BadSample("missing_field", spec["group_by"])
            group = group_id(value)
        label = None
        if spec["label"]:
            value = field_at(fields, spec["label"])
            if value is None:
                raise BadSample("missing_field", spec["label"])
            label = self._classes.get(str(value), -1)
        pixels = None
        if self.preprocess is not None:
            picture = self._picture(fields)
            if self._varies:
                pixels = augmented(picture, self.preprocess, spec["image"], job.image_key)
            else:
                pixels = self.preprocess.to_array(picture)
        extra = plain_fields(fields) if spec["extra"] else None
        return Decoded(pixels=pixels, texts=texts, group=group, label=label, extra=extra)

    def _picture(self, fields: dict[str, Any]) -> Image.Image:
        column = self.spec["columns"]["image"]
        paths = AUTO_IMAGE if column == "auto" else (column,)
        value = next((v for path in paths if (v := field_at(fields, path)) is not None), None)
        if value is None:
            raise BadSample("missing_image", "no picture" if column == "auto" else f"field {column}")
        if isinstance(value, Image.Image):
            return value
        if isinstance(self.reader, JsonLinesReader):
            value = self.reader.picture(value)
        if not isinstance(value, bytes):
            raise BadSample("missing_image", f"field {column} holds a {type(value).__name__}")
        return decode_picture(value, self.limits)


def plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are text or JSON; pictures are left out."""
    return {
        name: value
        for name, value in fields.items()
        if not isinstance(value, bytes) and not isinstance(value, Image.Image)
    }


def pack(results: list[Decoded]) -> tuple[bytes, bytes]:
    """Results as (JSON header, pixels one after another), to send through a pipe."""
    head, pixels = [], []
    for r in results:
        shape = None
        if r.pixels is not None:
            shape = r.pixels.shape
            pixels.append(r.pixels.tobytes())
        head.append([r.reason, r.detail, shape, r.texts, r.group, r.label, r.extra])
    return json.dumps(head).encode(), b"".join(pixels)


def unpack(head: bytes, pixels: bytes) -> list[Decoded]:
    """The inverse of `pack`."""
    out, at = [], 0
    for reason, detail, shape, texts, group, label, extra in json.loads(head):
        values = None
        if shape is not None:
            count = shape[0] * shape[1] * shape[2]
            values = np.frombuffer(pixels, np.uint8, count, at).reshape(shape)
            at += count
        out.append(Decoded(reason, detail, values, texts, group, label, extra))
    return out
