"""Collate: decoded samples to a Batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlm.data.decode import Decoded
from vlm.data.tokenizer import Tokenizer
from vlm.types.batch import Batch, Labels, Pictures, Stream, TokenIds


@dataclass(frozen=True)
class Row:
    """One decoded sample with what identifies it."""

    key: str
    draw: int
    epoch: int
    decoded: Decoded


def collate(
    rows: Sequence[Row], tokenizer: Tokenizer | None, length: int, size: int | None, *, grouped: bool
) -> Batch:
    """Streams `image` (uint8 [n, 3, size, size]) where size is given, the text streams where a tokenizer is, and `group`.

    A text stream that some sample lacks (`caption.3`) has no row for it.
    """
    streams: dict[str, Stream] = {}
    everyone = torch.arange(len(rows))
    if size is not None:
        pixels = torch.empty((len(rows), 3, size, size), dtype=torch.uint8)
        target = pixels.numpy()
        for i, row in enumerate(rows):
            target[i] = row.decoded.pixels
        streams["image"] = Pictures(pixels, torch.ones(len(rows), dtype=torch.bool), everyone)
    if tokenizer is not None:
        names = sorted({name for row in rows for name in row.decoded.texts}, key=_stream_order) or ["text"]
        for name in names:
            having = [i for i, row in enumerate(rows) if name in row.decoded.texts]
            streams[name] = token_stream(
                tokenizer, [rows[i].decoded.texts[name] for i in having], length, having
            )
    if grouped:
        values = torch.tensor([row.decoded.group or 0 for row in rows], dtype=torch.int64)
        streams["group"] = Labels(values, torch.ones(len(rows), dtype=torch.bool), everyone)
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


def token_stream(tokenizer: Tokenizer, texts: Sequence[str], length: int, samples: Sequence[int]) -> TokenIds:
    """Texts as rows of ids; samples: which sample each belongs to."""
    ids, mask = tokenizer.encode(texts, length)
    index = torch.from_numpy(np.asarray(samples, np.int64))
    return TokenIds(torch.from_numpy(ids), torch.from_numpy(mask), index)


def _stream_order(name: str) -> tuple[str, int]:
    head, _, number = name.rpartition(".")
    return (head, int(number)) if head and number.isdigit() else (name, 0)
