"""Where the visual tokens of a sample's pictures go in the rows of its texts.

n rows of text, T tokens, S positions after the expansion, P rows of pictures, K tokens a picture, F visual tokens in
all, C width, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.models.cross import Media
from vlm.types import Layout, Pictures, TokenIds
from vlm.types.layout import IGNORE, Modality


@dataclass(frozen=True)
class Visual:
    """The visual tokens of a picture stream, picture by picture.

    tokens [F, C], sample by sample in order of slot; owner [F], the row of the stream that each came from.
    A group is what one placeholder stands for: start, width [G] in `tokens`. pictures, rows: (first group, number of
    groups) [B] of each sample, when a placeholder is a picture with all its tiles, or a single row.
    """

    tokens: Tensor
    owner: Tensor
    start: Tensor
    width: Tensor
    pictures: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, tokens: Tensor, mask: Tensor | None, stream: Pictures, samples: int) -> Visual:
        """tokens [P, K, C], mask [P, K] or None, of the rows of `stream`, which belong to samples 0..samples-1."""
        device = tokens.device
        numbers = torch.arange(len(stream), device=device)
        # Without slots a row is a picture, unless places say that the rows are tiles of one.
        slot = stream.slot if stream.slot is not None else (numbers if stream.place is None else numbers * 0)
        key = stream.sample_index * (int(slot.max()) + 1 if len(slot) else 1) + slot
        order = torch.argsort(key, stable=True)
        order = order[stream.mask[order]]
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=device) if mask is None else mask
        row_width = valid[order].sum(1)
        row_start = row_width.cumsum(0) - row_width
        sample, key = stream.sample_index[order], key[order]
        new = torch.ones_like(key, dtype=torch.bool)
        new[1:] = key[1:] != key[:-1]
        group = new.cumsum(0) - 1
        count = int(new.sum())
        picture_width = row_width.new_zeros(count).index_add(0, group, row_width)
        by_picture, by_row = torch.bincount(sample[new], minlength=samples), torch.bincount(sample, minlength=samples)
        return cls(
            tokens=tokens[order][valid[order]],
            owner=order[:, None].expand(-1, tokens.shape[1])[valid[order]],
            start=torch.cat([row_start[new], row_start]),
            width=torch.cat([picture_width, row_width]),
            pictures=(by_picture.cumsum(0) - by_picture, by_picture),
            rows=(by_row.cumsum(0) - by_row + count, by_row),
        )

    @classmethod
    def none(cls, samples: int, width: int, like: Tensor) -> Visual:
        """No picture at all. like: a tensor of the device and type of the tokens."""
        empty = torch.zeros(0, dtype=torch.int64, device=like.device)
        zeros = torch.zeros(samples, dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(0, width), empty, empty, empty, (zeros, zeros), (zeros, zeros))


@dataclass(frozen=True)
class Places:
    """Which positions of the rows [n, T] are placeholders, and the group of each, -1 elsewhere."""

    group: Tensor

    @property
    def chosen(self) -> Tensor:
        return self.group >= 0

    def width(self, visual: Visual, other: int) -> Tensor:
        """[n, T] number of visual tokens of each placeholder, `other` elsewhere."""
        if not len(visual.width):
            return torch.full_like(self.group, other)
        return torch.where(self.chosen, visual.width[self.group.clamp(min=0)], other)

    def start(self, visual: Visual) -> Tensor:
        """[n, T] first visual token of each placeholder, 0 elsewhere."""
        if not len(visual.start):
            return torch.zeros_like(self.group)
        return torch.where(self.chosen, visual.start[self.group.clamp(min=0)], 0)


def place_pictures(stream: TokenIds, image_id: int, visual: Visual, *, keys: Sequence[str], name: str, context: str) -> Places:
    """The groups of the placeholders, in order. Raises ValueError naming the first sample whose number of placeholders
    is neither that of its pictures nor that of its rows of pictures."""
    chosen = stream.mask & (stream.values == image_id)
    count, sample = chosen.sum(1), stream.sample_index
    if not len(sample):
        return Places(torch.full_like(stream.values, -1))
    pictures, rows = visual.pictures[1][sample], visual.rows[1][sample]
    bad = (count != pictures) & (count != rows)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        tiles = f" of {int(rows[row])} tiles" if int(rows[row]) != int(pictures[row]) else ""
        raise ValueError(
            f"sample {keys[int(sample[row])]!r}: {int(count[row])} picture placeholders in {name!r}, "
            f"{int(pictures[row])} pictures{tiles} in {context!r}"
        )
    first = torch.where(count == pictures, visual.pictures[0][sample], visual.rows[0][sample])
    return Places(torch.where(chosen, first[:, None] + chosen.cumsum(1) - 1, -1))


def expand(stream: TokenIds, embedded: Tensor, places: Places, visual: Visual) -> tuple[Tensor, Layout]:
    """Every placeholder replaced by its visual tokens: embedded [n, T, C] -> x [n, S, C] and the layout, right-padded.

    Positions are counted anew in each segment; no loss reads a visual position.
    """
    width = torch.where(stream.mask, places.width(visual, 1), 0)
    n, length = width.shape
    ends = width.cumsum(1)
    total = ends[:, -1] if length else width.sum(1)
    size = int(total.max()) if n else 0
    place = torch.arange(size, device=width.device).expand(n, size).contiguous()
    source = torch.searchsorted(ends, place, right=True).clamp(max=max(length - 1, 0))
    valid = place < total[:, None]
    image = valid & places.chosen.gather(1, source)
    offset = place - (ends - width).gather(1, source)
    flat = torch.where(image, places.start(visual).gather(1, source) + offset, -1)
    x = embedded.gather(1, source[..., None].expand(-1, -1, embedded.shape[-1]))
    if len(visual.tokens):
        x = torch.where(image[..., None], visual.tokens[flat.clamp(min=0)].to(x.dtype), x)
        picture = torch.where(image, visual.owner[flat.clamp(min=0)], -1)
    else:
        picture = torch.full_like(flat, -1)

    def taken(tensor: Tensor) -> Tensor:
        return tensor.gather(1, source)

    supervised = stream.mask if stream.supervised is None else stream.supervised
    layout = Layout.of_tokens(
        taken(stream.values),
        valid,
        stream.sample_index,
        segment=None if stream.segment is None else torch.where(valid, taken(stream.segment), -1),
        supervised=taken(supervised) & ~image,
        target=None if stream.target is None else taken(stream.target),
        role=None if stream.role is None else taken(stream.role) * valid,
        modality=torch.where(image, int(Modality.IMAGE), int(Modality.TEXT)),
    )
    return x, replace(layout, picture=picture)


def beside(layout: Layout, places: Places, visual: Visual) -> tuple[Layout, Media | None]:
    """The placeholders stay single tokens that no loss reads: (layout of the text, visual tokens beside the rows), None
    where no row has a picture."""
    layout = replace(layout, label=torch.where(places.chosen, IGNORE, layout.label))
    width = places.width(visual, 0)
    ends = width.cumsum(1)
    n, length = width.shape
    total = ends[:, -1] if length else width.sum(1)
    size = int(total.max()) if n else 0
    if not size:
        return layout, None
    place = torch.arange(size, device=width.device).expand(n, size).contiguous()
    source = torch.searchsorted(ends, place, right=True).clamp(max=length - 1)
    mask = place < total[:, None]
    flat = places.start(visual).gather(1, source) + place - (ends - width).gather(1, source)
    tokens = visual.tokens[torch.where(mask, flat, 0)]
    return layout, Media(tokens, mask, layout.kept.gather(1, source), torch.where(mask, layout.segment.gather(1, source), -1))
