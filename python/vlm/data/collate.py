"""Collate: decoded samples to a Batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from vlm.data.decode import Decoded
from vlm.data.streams.encode import EncodedRow, conversation_stream, weight_stream
from vlm.data.tokenizer import Tokenizer
from vlm.types.batch import Batch, Labels, Pictures, Stream, TokenIds


@dataclass(frozen=True)
class Row:
    """One decoded sample with what identifies it; encoded: its conversations by stream."""

    key: str
    draw: int
    epoch: int
    decoded: Decoded
    encoded: dict[str, EncodedRow] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """What every batch holds, whatever its samples.

    pictures: picture stream -> (side, whether values are float in 0..1). length: tokens of a caption; None: no captions.
    conversations: names of conversation streams. tiled: rows of pictures are tiles, with their `place`.
    clips: the pictures of a sample are frames, numbered by `slot`. numbers: stream -> whether it has one a row of `text`; else one a
    sample. weights: stream of token weights -> its conversation.
    """

    pictures: Mapping[str, tuple[int, bool]]
    length: int | None
    conversations: Sequence[str] = ()
    grouped: bool = False
    labelled: bool = False
    tiled: bool = False
    clips: bool = False
    numbers: Mapping[str, bool] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)


def collate(rows: Sequence[Row], tokenizer: Tokenizer | None, shape: Shape) -> Batch:
    """Picture streams (uint8 or float32 [n, 3, S, S]), `text` of captions, conversation streams, `group`, `label`.

    Pictures beside conversations are numbered by `slot`; else each sample has one. A label that is none of the classes
    is masked.
    """
    streams: dict[str, Stream] = {}
    everyone = torch.arange(len(rows))
    for name, (size, floating) in shape.pictures.items():
        parts = [row.decoded.pixels[name] for row in rows]
        places = [row.decoded.places for row in rows] if shape.tiled else None
        streams[name] = picture_stream(parts, size, floating, bool(shape.conversations) or shape.clips, places)
    if tokenizer is not None:
        if shape.length is not None:
            streams["text"] = text_stream(tokenizer, [row.decoded.texts for row in rows], shape.length)
        for name in shape.conversations:
            own = [(i, row.encoded[name]) for i, row in enumerate(rows) if name in row.encoded]
            streams[name] = conversation_stream(own, tokenizer.pad_id)
            for weights in (w for w, of in shape.weights.items() if of == name):
                streams[weights] = weight_stream(weights, own, cast(TokenIds, streams[name]))
    for name, by_caption in shape.numbers.items():
        texts = [row.decoded.texts for row in rows] if by_caption else None
        streams[name] = number_stream([row.decoded.numbers.get(name) for row in rows], texts)
    if shape.grouped:
        values = torch.tensor([row.decoded.group or 0 for row in rows], dtype=torch.int64)
        streams["group"] = Labels(values, torch.ones(len(rows), dtype=torch.bool), everyone)
    if shape.labelled:
        classes = torch.tensor(
            [-1 if (c := row.decoded.label) is None else c for row in rows], dtype=torch.int64
        )
        streams["label"] = Labels(classes, classes >= 0, everyone)
    extra: Mapping[str, Sequence[object]] = {}
    if rows and rows[0].decoded.extra is not None:
        fields = [row.decoded.extra or {} for row in rows]
        names = sorted({name for values in fields for name in values})
        extra = {name: [values.get(name) for values in fields] for name in names}
    return Batch(
        streams=streams,
        keys=[row.key for row in rows],
        draws=torch.tensor([row.draw for row in rows], dtype=torch.int64),
        epoch=torch.tensor([row.epoch for row in rows], dtype=torch.int64),
        extra=extra,
    )


def picture_stream(
    parts: Sequence[np.ndarray],
    size: int,
    floating: bool,
    numbered: bool,
    places: Sequence[Sequence[tuple[int, int, int]]] | None = None,
) -> Pictures:
    """The pictures [k, 3, size, size] of each sample as rows in order; numbered: with their `slot`.

    places: (picture, tile row, tile column) of each row where rows are tiles; their `slot` is the picture's number.
    """
    counts = [len(part) for part in parts]
    n = sum(counts)
    pixels = torch.empty((n, 3, size, size), dtype=torch.float32 if floating else torch.uint8)
    if n:
        np.concatenate(parts, out=pixels.numpy())
    slots = [slot for count in counts for slot in range(count)]
    place = None
    if places is not None:
        flat = torch.tensor([at for own in places for at in own], dtype=torch.int64).reshape(-1, 3)
        place, slots, numbered = torch.cat([flat.new_zeros(len(flat), 1), flat[:, 1:]], 1), flat[:, 0].tolist(), True
    return Pictures(
        pixels,
        torch.ones(n, dtype=torch.bool),
        torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(counts, dtype=torch.int64)),
        slot=torch.tensor(slots, dtype=torch.int64) if numbered else None,
        place=place,
    )


def number_stream(numbers: Sequence[Sequence[float | None] | None], texts: Sequence[Sequence[str | None]] | None) -> Labels:
    """Numbers of each sample by slot as one row each, float32 [n], masked where a sample has none; texts: one a row of `text`, by slot."""
    slots = [[0]] * len(numbers) if texts is None else [[k for k, text in enumerate(own) if text is not None] for own in texts]
    rows = [(i, k, own[k] if own is not None else None) for i, (own, chosen) in enumerate(zip(numbers, slots)) for k in chosen]
    several = texts is not None and any(len(own) > 1 for own in texts)
    return Labels(
        torch.tensor([0.0 if number is None else number for _, _, number in rows], dtype=torch.float32),
        torch.tensor([number is not None for _, _, number in rows], dtype=torch.bool),
        torch.tensor([i for i, _, _ in rows], dtype=torch.int64),
        slot=torch.tensor([k for _, k, _ in rows], dtype=torch.int64) if several else None,
    )


def text_stream(tokenizer: Tokenizer, texts: Sequence[Sequence[str | None]], length: int) -> TokenIds:
    """Texts of each sample by slot, as rows of ids [n, length]; an empty slot has no row. One slot: `slot` is None."""
    rows = [
        (i, slot, text) for i, own in enumerate(texts) for slot, text in enumerate(own) if text is not None
    ]
    ids, mask = tokenizer.encode([text for _, _, text in rows], length)
    several = any(len(own) > 1 for own in texts)
    return TokenIds(
        torch.from_numpy(ids),
        torch.from_numpy(mask),
        torch.tensor([i for i, _, _ in rows], dtype=torch.int64),
        slot=torch.tensor([slot for _, slot, _ in rows], dtype=torch.int64) if several else None,
    )
