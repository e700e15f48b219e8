"""Decode one sample: fields to pixels and texts. Runs in the main process or in a worker, and imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from pydantic import TypeAdapter

from vlm.config.errors import DataError
from vlm.data.augment import augmented, flipped
from vlm.data.boxes import seen_box
from vlm.data.captions import choose, places, text_values
from vlm.data.noise import noisy, signal_shares
from vlm.data.samples import BadSample, field_at, group_id
from vlm.data.sources.readers import JsonLinesReader, open_reader
from vlm.data.streams.conversation import Box, Conversations, Said
from vlm.data.streams.messages import pictures_in
from vlm.data.streams.number_options import NumberStream, TokenWeights
from vlm.data.streams.numbers import Marked, Numbers, Weights
from vlm.data.streams.options import ConversationStream
from vlm.runtime.chat import Template
from vlm.runtime.film import film_strip, frames_of, is_clip
from vlm.runtime.pictures import BadPicture, PictureLimits, decode_picture
from vlm.runtime.pieces import Piece
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.tiled import TiledPicture, cut_picture, with_tiles
from vlm.runtime.tiling import Tiling
from vlm.types.random import draw_key

AUTO_IMAGE = ("image", "picture", "file_name", "filepath", "image_path")
"""Fields that hold the picture where the options do not say."""
AUTO_IMAGES = (*AUTO_IMAGE, "images", "pictures")
"""The same for conversations, which may have several."""


@dataclass(frozen=True)
class Job:
    """One sample to decode: where it lies, and the keys of its draws; stream_keys: those of `[data.streams]` by name."""

    recipe: Any
    image_key: int = 0
    caption_key: int = 0
    stream_keys: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Decoded:
    """A good sample (reason is empty) or the reason why it is bad.

    pixels: picture stream -> [k, 3, S, S], uint8 or float32 in 0..1, k pictures in order; or their tiles, with places:
    (picture, tile row, tile column) of each. texts: by slot, None where a slot is empty. label: class. extra: fields that
    JSON can say, where they are asked for. conversations: stream -> pieces. numbers: stream -> one by slot, None where a slot
    is empty. marks: stream of token weights -> those of each answer, in order.
    """

    reason: str = ""
    detail: str = ""
    pixels: dict[str, np.ndarray] = field(default_factory=dict)
    texts: list[str | None] = field(default_factory=list)
    group: int | None = None
    label: int | None = None
    extra: dict[str, Any] | None = None
    conversations: dict[str, list[Piece]] = field(default_factory=dict)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    numbers: dict[str, list[float | None]] = field(default_factory=dict)
    marks: dict[str, list[Marked]] = field(default_factory=dict)


class Decoder:
    """Built from one JSON value, so that a worker can build the same.

    spec: `source` (of the reader), `limits`, `pictures` (stream -> fields of Preprocess), `tiling` (fields of Tiling, or
    None), `frames` (most frames of a clip, or None), `image` (ImageOptions),
    `captions`, `columns`, `max_text`, `group_by`, `label`, `classes`, `texts` (whether captions are asked for), `train`,
    `extra`; `conversations`, `noises`, `numbers` and `token_weights` (name -> table), `template`, `nouns`, `weights`.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.limits = PictureLimits(**spec["limits"])
        self.reader = open_reader(spec["source"], self.limits)
        self.preprocesses = {
            name: Preprocess(**{**made, "mean": tuple(made["mean"]), "std": tuple(made["std"])})
            for name, made in spec["pictures"].items()
        }
        self.frames: int | None = spec.get("frames")
        self.tiling = None if spec["tiling"] is None else Tiling(**spec["tiling"])
        self._classes = {name: number for number, name in enumerate(spec["classes"])}
        image = spec["image"]
        self._varies = spec["train"] and (image["augment"] != "none" or image["flip"])
        streams = TypeAdapter(dict[str, ConversationStream]).validate_python(spec["conversations"])
        self._conversations = Conversations(streams, spec["columns"], spec["max_text"], spec["nouns"], spec["weights"])
        self._numbers = Numbers(TypeAdapter(dict[str, NumberStream]).validate_python(spec["numbers"]), spec["columns"])
        weights = TypeAdapter(dict[str, TokenWeights]).validate_python(spec["token_weights"])
        self._weights = Weights({name: table for name, table in weights.items() if table.of in streams}, spec["columns"])
        self._template = Template.from_dict(spec["template"]) if streams else None
        self._text_only = all(stream.text_only for stream in streams.values())
        self._shares = {
            name: float(signal_shares(noise["steps"], noise["betas"])[noise["step"]]) for name, noise in spec["noises"].items()
        }

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
        numbers = self.number(fields, job.caption_key)
        if self._template is not None:
            pictures, said = self.converse(fields, job.stream_keys)
        else:
            pictures, said = self._shown(fields) if self.preprocesses else [], {}
        conversations = self.write(said, len(pictures))
        marks = self.weigh(fields, said)
        cut_places: list[tuple[int, int, int]] = []
        if self.tiling is not None:
            cut = self._cut(pictures, self.tiling, job)
            cut_places = [(number, *place) for number, one in enumerate(cut) for place in one.places]
            tags = [one.tags for one in cut]
            conversations = {name: with_tiles(pieces, tags, self.tiling) for name, pieces in conversations.items()}
            rows = {name: np.concatenate([one[name] for one in cut]) for name in self.preprocesses if cut}
        else:
            rows = self._rows(pictures, job)
        pixels = self._pixels(rows, job)
        extra = plain_fields(fields) if spec["extra"] else None
        return Decoded(
            pixels=pixels,
            texts=texts,
            group=group,
            label=label,
            extra=extra,
            conversations=conversations,
            places=cut_places,
            numbers=numbers,
            marks=marks,
        )

    def number(self, fields: dict[str, Any], caption_key: int | None) -> dict[str, list[float | None]]:
        """The numbers of each stream by slot. caption_key: of the draw of captions; None: those of all. Raises BadSample."""
        spec, count = self.spec, 0
        taken: list[int] = []
        if spec["texts"] and any(stream.each == "caption" for stream in self._numbers.streams.values()):
            count = len(text_values(fields, spec["columns"]["text"]))
            taken = list(range(count)) if caption_key is None else places(count, spec["captions"], caption_key)
        return self._numbers.make(fields, count, taken)

    def weigh(self, fields: dict[str, Any], said: dict[str, Said]) -> dict[str, list[Marked]]:
        """The weights of the answers of each conversation that has some. Raises BadSample."""
        out: dict[str, list[Marked]] = {}
        for name, table in self._weights.streams.items():
            assert self._template is not None
            one, lead = said[table.of], len(self._template.answer_lead)
            made = self._weights.make(name, fields, one.answers, one.entries)
            out[name] = [m._replace(spans=[(a + lead, b + lead, weight) for a, b, weight in m.spans]) for m in made]
        return out


    def converse(self, fields: dict[str, Any], keys: dict[str, int]) -> tuple[list[Image.Image], dict[str, Said]]:
        """The pictures of a sample in order and the messages of each conversation stream. Raises BadSample, BadPicture."""
        pictures = self._pictures(fields) if self.preprocesses else []

        def seen(box: Any) -> Box | None:
            if len(pictures) != 1:
                raise BadSample("bad_box", f"boxes of {len(pictures)} pictures, expected one")
            return seen_box(box, *pictures[0].size, self.preprocesses["image"])

        said = self._conversations.make(fields, keys, seen) if self.preprocesses else self._conversations.make(fields, keys)
        if self.preprocesses and not pictures:
            held = next((one.addresses for one in said.values() if one.addresses), [])
            pictures = self._opened_all(pictures_in(held))
            if not pictures and not self._text_only:
                raise BadSample("missing_image", "no picture")
        return pictures, said

    def write(self, said: dict[str, Said], pictures: int) -> dict[str, list[Piece]]:
        """The pieces of each stream. Raises BadSample when one has more or fewer placeholders than there are pictures."""
        out: dict[str, list[Piece]] = {}
        for name, one in said.items():
            assert self._template is not None
            try:
                out[name] = pieces_of(one, pictures, self._template)
            except BadSample as error:
                raise BadSample(error.reason, f"{name}: {error.detail}") from None
        return out

    def _cut(self, pictures: list[Image.Image], tiling: Tiling, job: Job) -> list[TiledPicture]:
        """The pictures in tiles, whose pixels together are bounded as those of the pictures are."""
        pieces = sum(len(tiling.places_of(tiling.grid(*picture.size))) for picture in pictures)
        largest = max((preprocess.size for preprocess in self.preprocesses.values()), default=0)
        most = 2 * self.limits.max_pixels
        if pieces * largest**2 > most:
            raise BadSample("too_many_pictures", f"{pieces} tiles of {largest} x {largest} pixels, expected at most {most} pixels")
        if self._varies:
            pictures = [flipped(picture, slot_key(job.image_key, slot)) for slot, picture in enumerate(pictures)]
        return [cut_picture(picture, tiling, self.preprocesses) for picture in pictures]

    def _rows(self, pictures: list[Image.Image], job: Job) -> dict[str, np.ndarray]:
        """The pictures under each tower's preprocessing, all from the same draw."""
        out: dict[str, np.ndarray] = {}
        for name, preprocess in self.preprocesses.items():
            rows = []
            for slot, picture in enumerate(pictures):
                if self._varies:
                    key = slot_key(job.image_key, slot if self.frames is None else 0)  # the frames of a clip vary alike
                    rows.append(augmented(picture, preprocess, self.spec["image"], key))
                else:
                    rows.append(preprocess.to_array(picture))
            if rows:
                out[name] = np.stack(rows)
        return out

    def _pixels(self, rows: dict[str, np.ndarray], job: Job) -> dict[str, np.ndarray]:
        """Every picture stream: the rows of the towers, none where there is no picture, and the noisy ones."""
        out: dict[str, np.ndarray] = {}
        for name, preprocess in self.preprocesses.items():
            size = preprocess.size
            out[name] = rows[name] if name in rows else np.zeros((0, 3, size, size), np.uint8)
        if self.preprocesses:
            for name, noise in self.spec["noises"].items():
                clean, key = out[noise["of"]], job.stream_keys.get(name, 0)
                parts = [noisy(x, self._shares[name], draw_key(key, "slot", slot)) for slot, x in enumerate(clean)]
                out[name] = np.stack(parts) if parts else clean.astype(np.float32)
        return out

    def _shown(self, fields: dict[str, Any]) -> list[Image.Image]:
        """The picture, or the frames of a clip for a model that reads clips. Raises BadSample for a clip before any other."""
        picture = self._picture(fields)
        if self.frames is not None:
            return frames_of(picture, self.frames)
        if is_clip(picture):
            raise BadSample("clip")
        return [picture]

    def _picture(self, fields: dict[str, Any]) -> Image.Image:
        column = self.spec["columns"]["image"]
        names = AUTO_IMAGE if self.frames is None else AUTO_IMAGES
        paths = names if column == "auto" else (column,)
        value = next((v for path in paths if (v := field_at(fields, path)) is not None), None)
        if value is None:
            raise BadSample("missing_image", "no picture" if column == "auto" else f"field {column}")
        if self.frames is not None and isinstance(value, list) and value:
            return film_strip(self._opened_all(pictures_in(value), column))
        return self._opened(value, column)

    def _pictures(self, fields: dict[str, Any]) -> list[Image.Image]:
        column = self.spec["columns"]["image"]
        paths = AUTO_IMAGES if column == "auto" else (column,)
        value = next((v for path in paths if (v := field_at(fields, path)) is not None), None)
        return self._opened_all(pictures_in(value), column)

    def _opened_all(self, values: list[Any], column: str = "auto") -> list[Image.Image]:
        """Several pictures, whose pixels together are bounded too: they are in memory at once."""
        out: list[Image.Image] = []
        total = 0
        for value in values:
            out.append(self._opened(value, column))
            total += out[-1].width * out[-1].height
            if total > 2 * self.limits.max_pixels:
                raise BadSample("too_many_pictures", f"{total} pixels, expected at most {2 * self.limits.max_pixels} together")
        return out

    def _opened(self, value: Any, column: str = "auto") -> Image.Image:
        if isinstance(value, Image.Image):
            return value
        if isinstance(self.reader, JsonLinesReader):
            value = self.reader.picture(value)
        if not isinstance(value, bytes):
            raise BadSample("missing_image", f"field {column} holds a {type(value).__name__}")
        return decode_picture(value, self.limits)


class MixedDecoder:
    """Decoders of the sources of a mixture. Recipe: [number of the source, its recipe]."""

    def __init__(self, specs: list[dict[str, Any]]) -> None:
        self._parts = [Decoder(spec) for spec in specs]

    def decode(self, job: Job) -> Decoded:
        part, recipe = job.recipe
        return self._parts[part].decode(Job(recipe, job.image_key, job.caption_key, job.stream_keys))


def decoder_of(spec: dict[str, Any]) -> Decoder | MixedDecoder:
    """The decoder of a spec; one with `parts` is that of a mixture."""
    return MixedDecoder(spec["parts"]) if "parts" in spec else Decoder(spec)


def slot_key(key: int, slot: int) -> int:
    """The key of the draws of a sample's picture number `slot`."""
    return key if slot == 0 else draw_key(key, "slot", slot)


def pieces_of(said: Said, pictures: int, template: Template) -> list[Piece]:
    """The pieces of a conversation with so many pictures. Raises BadSample with both counts when they do not fit."""
    placed = sum(message.pictures for message in said.messages)
    if placed and placed != pictures:
        raise BadSample("placeholder_mismatch", f"{placed} placeholders, {pictures} pictures")
    try:
        return template.pieces(template.with_pictures(said.messages, pictures), answer=True)
    except DataError as error:
        raise BadSample("bad_messages", error.message) from None


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
        arrays = [[name, value.dtype.str, value.shape] for name, value in r.pixels.items()]
        pixels += [np.ascontiguousarray(value).tobytes() for value in r.pixels.values()]
        said = {name: [[p.kind, p.text, p.role, p.supervised] for p in pieces] for name, pieces in r.conversations.items()}
        head.append([r.reason, r.detail, arrays, r.texts, r.group, r.label, r.extra, said, r.places, r.numbers, r.marks])
    return json.dumps(head).encode(), b"".join(pixels)


def unpack(head: bytes, pixels: bytes) -> list[Decoded]:
    """The inverse of `pack`."""
    out, at = [], 0
    for reason, detail, arrays, texts, group, label, extra, said, cut, numbers, marks in json.loads(head):
        values: dict[str, np.ndarray] = {}
        for name, kind, shape in arrays:
            dtype, count = np.dtype(kind), math.prod(shape)
            values[name] = np.frombuffer(pixels[at : at + count * dtype.itemsize], dtype, count).reshape(shape)
            at += count * dtype.itemsize
        conversations = {name: [Piece(*piece) for piece in pieces] for name, pieces in said.items()}
        places_of = [(picture, row, column) for picture, row, column in cut]
        marked = {name: [Marked(rest, [tuple(s) for s in spans], end) for rest, spans, end in own] for name, own in marks.items()}
        out.append(Decoded(reason, detail, values, texts, group, label, extra, conversations, places_of, numbers, marked))
    return out
