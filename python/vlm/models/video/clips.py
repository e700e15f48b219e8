"""Which rows of a picture stream are the frames of which clip. n rows, B clips, T frames of the longest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.types import Pictures


@dataclass(frozen=True)
class Clips:
    """index int64 [B, T]: the row of each frame, -1 padded right; mask bool [B, T]: frames that are there and valid.

    at int64 [n]: place of each row in B x T; sample_index [B], rising. whole: whether every place holds a valid frame.
    """

    index: Tensor
    mask: Tensor
    at: Tensor
    sample_index: Tensor
    whole: bool

    @classmethod
    def of(cls, stream: Pictures, most: int | None = None) -> Clips:
        """The rows of a sample are one clip, in the order of their slots, or of the rows where they have none.

        Raises ValueError for tiles, and for a clip of more than `most` frames.
        """
        if stream.place is not None:
            raise ValueError("a clip is made of whole frames, this stream holds tiles")
        order = torch.arange(len(stream), device=stream.mask.device)
        if stream.slot is not None:
            order = torch.argsort(stream.slot, stable=True)
        order = order[torch.argsort(stream.sample_index[order], stable=True)]
        samples, counts = torch.unique_consecutive(stream.sample_index[order], return_counts=True)
        longest = int(counts.max()) if len(counts) else 0
        if most is not None and longest > most:
            raise ValueError(f"a clip of {longest} frames, the tower reads at most {most}")
        number = torch.arange(len(stream), device=order.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = torch.arange(len(counts), device=order.device).repeat_interleave(counts) * longest + number
        index = torch.full((len(counts) * longest,), -1, dtype=torch.int64, device=order.device)
        index[place] = order
        at = torch.empty_like(order)
        at[order] = place
        index = index.view(len(counts), longest)
        mask = (index >= 0) & stream.mask[index.clamp(min=0)] if len(stream) else index >= 0
        return cls(index, mask, at, samples, bool(mask.all()))

    @classmethod
    def single(cls, rows: Tensor) -> Clips:
        """Every one of the rows [n, ...] is a clip of one frame."""
        at = torch.arange(rows.shape[0], device=rows.device)
        return cls(at[:, None], torch.ones_like(at[:, None], dtype=torch.bool), at, at, True)

    @property
    def key_mask(self) -> Tensor | None:
        """What attention over frames may see [B, T]; None where that is everything."""
        return None if self.whole else self.mask

    @property
    def number(self) -> Tensor:
        """[n] int64: the number of each row's frame in its clip."""
        return self.at % max(1, self.index.shape[1])

    def gather(self, x: Tensor) -> Tensor:
        """Rows [n, ...] -> [B, T, ...]; a place without a valid frame holds zeros."""
        if not x.shape[0]:
            return x.new_zeros(*self.index.shape, *x.shape[1:])
        rows = x[self.index.clamp(min=0)]
        return rows if self.whole else rows.masked_fill(~self.mask.view(*self.mask.shape, *[1] * (x.ndim - 1)), 0.0)

    def rows(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> rows [n, ...]."""
        return x.flatten(0, 1)[self.at]

    def mean(self, x: Tensor) -> Tensor:
        """[B, T, C] -> the mean over the valid frames of each clip [B, C]; 0 for a clip without any."""
        if self.whole:
            return x.mean(1)
        counts = self.mask.sum(1, keepdim=True).clamp(min=1)
        return torch.where(self.mask[..., None], x, 0.0).sum(1) / counts
