"""Collate: decoded samples to a Batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    rows: Sequence[Row],
    tokenizer: Tokenizer | None,
    length: int,
    size: int | None,
    *,
    grouped: bool,
    labelled: bool,
) -> Batch:
    """Streams `image` (uint8 [n, 3, size, size]) where size is given, `text` where a tokenizer is, `group`, `label`.

    A label that is none of the classes is masked.
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
        streams["text"] = text_stream(tokenizer, [row.decoded.texts for row in rows], length)
    if grouped:
        values = torch.tensor([row.decoded.group or 0 for row in rows], dtype=torch.int64)
        streams["group"] = Labels(values, torch.ones(len(rows), dtype=torch.bool), everyone)
    if labelled:
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
