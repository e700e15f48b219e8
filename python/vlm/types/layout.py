"""Layout: what every position of a sequence is.

A model that drops, merges or packs tokens returns the new layout with its outputs. Losses, caches and decoding
read the layout, never the batch. Shapes: n rows, T positions.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

IGNORE = -100
"""Label of a position that no loss reads."""


class Modality(IntEnum):
    """What a position carries."""

    TEXT = 0
    IMAGE = 1
    IMAGE_CODE = 2
    QUERY = 3


@dataclass(frozen=True)
class Layout:
    """One entry a position, each tensor [n, T].

    mask: bool, valid; position: int64, what rotary or learned positions see; segment: int64, packed document,
    -1 at padding; modality: int64 of `Modality`; role: int64 of `Role`; label: int64 target *at* this position or
    `IGNORE` (shifting is the loss's work); picture: int64, row of the picture stream it came from, -1 elsewhere;
    kept: int64, index of the position in the sequence before any token was dropped; sample_index: [n].
    """

    mask: Tensor
    position: Tensor
    segment: Tensor
    modality: Tensor
    role: Tensor
    label: Tensor
    picture: Tensor
    kept: Tensor
    sample_index: Tensor

    @classmethod
    def of_tokens(
        cls,
        ids: Tensor,
        mask: Tensor,
        sample_index: Tensor,
        *,
        segment: Tensor | None = None,
        position: Tensor | None = None,
        supervised: Tensor | None = None,
        target: Tensor | None = None,
        role: Tensor | None = None,
        modality: int | Tensor = Modality.TEXT,
    ) -> Layout:
        """The layout of plain token rows ids [n, T]; labels are `target`, or the ids themselves.

        Positions count valid tokens from 0 and start again with every segment.
        """
        arange = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        if segment is None:
            segment = torch.where(mask, 0, -1)
        if position is None:
            starts = torch.ones_like(mask)
            starts[:, 1:] = segment[:, 1:] != segment[:, :-1]
            first = torch.where(starts, arange, 0).cummax(dim=1).values
            position = arange - first
        counted = mask if supervised is None else mask & supervised
        return cls(
            mask=mask,
            position=position,
            segment=segment,
            modality=modality if isinstance(modality, Tensor) else torch.full_like(ids, int(modality)),
            role=torch.zeros_like(ids) if role is None else role,
            label=torch.where(counted, ids if target is None else target, IGNORE),
            picture=torch.full_like(ids, -1),
            kept=arange.clone(),
            sample_index=sample_index,
        )

    def gather(self, index: Tensor, *, renumber: bool = False) -> Layout:
        """The layout after keeping positions `index` [n, K], ascending in each row, -1 as padding on the right.

        renumber: valid positions are counted from 0 in each segment again (pyramiddrop); otherwise each kept token
        keeps its position (aim). A padding position is masked, ignored, of segment -1.
        """
        absent, at = index < 0, index.clamp(min=0)
        changed = {
            f.name: torch.gather(getattr(self, f.name), 1, at).masked_fill(absent, _PADDING[f.name])
            for f in fields(self)
            if f.name != "sample_index"
        }
        if renumber:
            mask, segment = changed["mask"], changed["segment"]
            count = mask.cumsum(1) - 1
            starts = mask.clone()
            starts[:, 1:] &= segment[:, 1:] != segment[:, :-1]
            first = torch.where(starts, count, 0).cummax(dim=1).values
            changed["position"] = torch.where(mask, count - first, 0)
        return replace(self, **changed)


_PADDING = {
    "mask": False,
    "position": 0,
    "segment": -1,
    "modality": int(Modality.TEXT),
    "role": 0,
    "label": IGNORE,
    "picture": -1,
    "kept": -1,
}
"""What each field holds at a position that is padding."""
