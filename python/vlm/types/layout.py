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
    -1 at padding; modality: int64 of `Modality`; label: int64 target at this position or `IGNORE`;
    kept: int64, index of the position in the sequence before any token was dropped; sample_index: [n].
    """

    mask: Tensor
    position: Tensor
    segment: Tensor
    modality: Tensor
    label: Tensor
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
        modality: int = Modality.TEXT,
    ) -> Layout:
        """The layout of plain token rows ids [n, T]; labels are the ids themselves (shifting is the loss's work).

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
        target = mask if supervised is None else mask & supervised
        return cls(
            mask=mask,
            position=position,
            segment=segment,
            modality=torch.full_like(ids, int(modality)),
            label=torch.where(target, ids, IGNORE),
            kept=arange.clone(),
            sample_index=sample_index,
        )

    def gather(self, index: Tensor, *, renumber: bool = False) -> Layout:
        """The layout after keeping positions `index` [n, K] (ascending in each row).

        renumber: positions become 0..K-1 (pyramiddrop); otherwise each kept token keeps its position (aim).
        """
        changed = {
            f.name: torch.gather(getattr(self, f.name), 1, index) for f in fields(self) if f.name != "sample_index"
        }
        if renumber:
            changed["position"] = torch.arange(index.shape[1], device=index.device).expand_as(index).clone()
        return replace(self, **changed)
