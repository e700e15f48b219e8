"""Where the visual tokens of a sample's pictures go in the rows of its texts: into the row (`expand`), beside it
(`beside`), or the thumbnails into it and the tiles beside it (`divided`).

n rows of text, T tokens, S positions after the expansion, P rows of pictures, K tokens a picture, F visual tokens in
all, C width, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlm.models.cross import Media
from vlm.runtime.tiling import THUMBNAIL
from vlm.types import Layout, Pictures, TokenIds
from vlm.types.batch import Role
from vlm.types.layout import IGNORE, Modality


@dataclass(frozen=True)
class Visual:
    """The visual tokens of a picture stream, picture by picture.

    tokens [F, C], sample by sample in order of slot; owner [F], the row of the stream that each came from.
    A group is what one placeholder stands for: start, width [G] in `tokens`; several [G], whether these are
    several rows; tile [G], whether it is one row that is neither a whole picture nor a thumbnail. pictures, rows: (first
    group, number of groups) [B] of each sample, when a placeholder is a picture with all its tiles, or a single row.
    penalty [B]: of the share that learned steps keep, see `vlm.tokens.learned`.
    """

    tokens: Tensor
    owner: Tensor
    start: Tensor
    width: Tensor
    tile: Tensor
    several: Tensor
    pictures: tuple[Tensor, Tensor]
    rows: tuple[Tensor, Tensor]
    penalty: Tensor | None = None

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
        is_tile = torch.zeros_like(new)
        if stream.place is not None:
            is_tile = (stream.place[order][:, 1:] != stream.place.new_tensor(THUMBNAIL)).any(1)
        several = torch.bincount(group, minlength=count) > 1
        by_picture, by_row = torch.bincount(sample[new], minlength=samples), torch.bincount(sample, minlength=samples)
        return cls(
            tokens=tokens[order][valid[order]],
            owner=order[:, None].expand(-1, tokens.shape[1])[valid[order]],
            start=torch.cat([row_start[new], row_start]),
            width=torch.cat([picture_width, row_width]),
            tile=torch.cat([is_tile[new] & ~several, is_tile]),
            several=torch.cat([several, torch.zeros_like(new)]),
            pictures=(by_picture.cumsum(0) - by_picture, by_picture),
            rows=(by_row.cumsum(0) - by_row + count, by_row),
        )

    @classmethod
    def none(cls, samples: int, width: int, like: Tensor) -> Visual:
        """No picture at all. like: a tensor of the device and type of the tokens."""
        empty = torch.zeros(0, dtype=torch.int64, device=like.device)
        zeros = torch.zeros(samples, dtype=torch.int64, device=like.device)
        return cls(like.new_zeros(0, width), empty, empty, empty, empty.bool(), empty.bool(), (zeros, zeros), (zeros, zeros))


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


@dataclass(frozen=True)
class Unfolded:
    """Columns of rows laid out anew, each `width` times: of each new place its column, whether it is one, and its number
    among those of the column; [n, S] each, right-padded."""

    column: Tensor
    valid: Tensor
    offset: Tensor

    @classmethod
    def of(cls, width: Tensor) -> Unfolded:
        """width [n, T] int64, how often each column is there."""
        n, length = width.shape
        ends = width.cumsum(1)
        total = ends[:, -1] if length else width.sum(1)
        size = int(total.max()) if n else 0
        place = torch.arange(size, device=width.device).expand(n, size).contiguous()
        column = torch.searchsorted(ends, place, right=True).clamp(max=max(length - 1, 0))
        return cls(column, place < total[:, None], place - (ends - width).gather(1, column))

    def take(self, tensor: Tensor) -> Tensor:
        """[n, T] or [n, T, C] by new place."""
        if tensor.dim() == 2:
            return tensor.gather(1, self.column)
        return tensor.gather(1, self.column[..., None].expand(-1, -1, tensor.shape[-1]))

    def filled(self, embedded: Tensor, places: Places, visual: Visual) -> tuple[Tensor, Tensor]:
        """(embedded [n, T, C] with the visual tokens where placeholders are laid out [n, S, C], which of them [n, S], -1
        elsewhere)."""
        image = self.valid & self.take(places.chosen)
        flat = torch.where(image, self.take(places.start(visual)) + self.offset, -1)
        x = self.take(embedded)
        if len(visual.tokens):
            x = torch.where(image[..., None], visual.tokens[flat.clamp(min=0)].to(x.dtype), x)
        return x, flat


def expand(
    stream: TokenIds, embedded: Tensor, places: Places, visual: Visual, apart: Tensor | None = None
) -> tuple[Tensor, Layout]:
    """Every placeholder replaced by its visual tokens: embedded [n, T, C] -> x [n, S, C] and the layout, right-padded.

    apart [n, T] bool: columns that are left out. Positions are counted anew in each segment; no loss reads a visual
    position.
    """
    kept = stream.mask if apart is None else stream.mask & ~apart
    laid = Unfolded.of(torch.where(kept, places.width(visual, 1), 0))
    x, flat = laid.filled(embedded, places, visual)
    image, valid = flat >= 0, laid.valid
    picture = torch.where(image, visual.owner[flat.clamp(min=0)], -1) if len(visual.tokens) else torch.full_like(flat, -1)
    supervised = stream.mask if stream.supervised is None else stream.supervised
    layout = Layout.of_tokens(
        laid.take(stream.values),
        valid,
        stream.sample_index,
        segment=None if stream.segment is None else torch.where(valid, laid.take(stream.segment), -1),
        supervised=laid.take(supervised) & ~image,
        target=None if stream.target is None else laid.take(stream.target),
        role=None if stream.role is None else laid.take(stream.role) * valid,
        modality=torch.where(image, int(Modality.IMAGE), int(Modality.TEXT)),
    )
    return x, replace(layout, picture=picture)


def announced(stream: TokenIds, places: Places) -> Tensor | None:
    """[n, T] int64: the column of the placeholder that a tag announces, the next one of its row; -1 elsewhere. None
    where no token is a tag."""
    if stream.role is None:
        return None
    tag = stream.mask & (stream.role == int(Role.TAG))
    if not bool(tag.any()):
        return None
    length = tag.shape[1]
    column = torch.arange(length, device=tag.device).expand_as(tag)
    following = torch.where(places.chosen, column, length).flip(1).cummin(1).values.flip(1)
    return torch.where(tag & (following < length), following, -1)


def beside(layout: Layout, places: Places, visual: Visual, tags: Tensor | None = None) -> tuple[Layout, Media | None]:
    """The placeholders stay single tokens that no loss reads: (layout of the text, visual tokens beside the rows), None
    where no row has a picture. tags: as `announced` gives them."""
    layout = replace(layout, label=torch.where(places.chosen, IGNORE, layout.label))
    laid = Unfolded.of(places.width(visual, 0))
    if not laid.valid.shape[1]:
        return layout, None
    flat = torch.where(laid.valid, laid.take(places.start(visual)) + laid.offset, 0)
    segment = torch.where(laid.valid, laid.take(layout.segment), -1)
    own = None if tags is None else torch.where(tags >= 0, layout.kept.gather(1, tags.clamp(min=0)), -1)
    return layout, Media(visual.tokens[flat], laid.valid, laid.take(layout.kept), segment, own)


def divided(
    stream: TokenIds, embedded: Tensor, places: Places, visual: Visual, tags: Tensor | None
) -> tuple[Tensor, Layout, Media | None]:
    """Thumbnails in the row as `expand` puts them there, tiles beside it, each behind the embeddings of its tag: (x, layout,
    the tiles or None where there is none). Neither tiles nor their tags have a position. Source: nvlm (form H).

    Positions behind the place where a tile stood see it. Raises ValueError for a placeholder of several rows.
    """
    tile = torch.zeros_like(places.chosen)
    if len(visual.tile):
        group = places.group.clamp(min=0)
        if bool((places.chosen & visual.several[group]).any()):
            raise ValueError("a placeholder stands for a picture with all its tiles, expected one for each tile")
        tile = places.chosen & visual.tile[group]
    apart = tile if tags is None else tile | ((tags >= 0) & tile.gather(1, tags.clamp(min=0)))
    x, layout = expand(stream, embedded, places, visual, apart)
    width = places.width(visual, 1)
    laid = Unfolded.of(torch.where(apart, width, 0))
    if not laid.valid.shape[1]:
        return x, layout, None
    tokens, _ = laid.filled(embedded, places, visual)
    here = torch.where(stream.mask & ~apart, width, 0)
    before = here.cumsum(1) - here  # of each column, the positions of the row that stand before it
    segment = torch.where(stream.mask, 0, -1) if stream.segment is None else stream.segment
    return x, layout, Media(tokens, laid.valid, laid.take(before), torch.where(laid.valid, laid.take(segment), -1))


def mean_of_samples(values: Tensor, stream: Pictures, samples: int) -> Tensor:
    """values [P] of the rows of a stream -> their means over the valid rows of each sample [B], 0 for a sample without any."""
    valid = stream.mask.to(values.dtype)
    zeros = values.new_zeros(samples)
    counts = zeros.index_add(0, stream.sample_index, valid)
    return zeros.index_add(0, stream.sample_index, torch.where(stream.mask, values, 0.0)) / counts.clamp(min=1)


def kept_share(before: Layout, after: Layout) -> Tensor:
    """[n]: share of the visual positions of each row that are left, 1 for a row without any."""
    counts = [((part.modality == int(Modality.IMAGE)) & part.mask).sum(1).float() for part in (before, after)]
    return torch.where(counts[0] > 0, counts[1] / counts[0].clamp(min=1), 1.0)
