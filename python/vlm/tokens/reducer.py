"""Dropping positions of pictures between the layers of a decoder. Source: pyramiddrop.

n rows, T positions, K kept ones, C width.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from vlm.tokens.score import Rotary, ScoringBlock, attention_from_rows, rows_first
from vlm.types import Layout
from vlm.types.layout import Modality


class TokenReducer:
    """The reducer of one pass: it remembers how many positions each picture had before any drop."""

    def __init__(self, layout: Layout, shares: Mapping[int, Fraction], *, renumber: bool) -> None:
        self.shares = dict(shares)
        self.renumber = renumber
        self.counts = picture_counts(layout)

    def layers(self) -> frozenset[int]:
        return frozenset(self.shares)

    def __call__(self, layer: int, x: Tensor, layout: Layout, block: ScoringBlock, rotary: Rotary | None) -> Tensor:
        """Positions that stay after `layer`, [n, K] ascending, -1 padded right; block is the next to run."""
        share = self.shares[layer]
        original = self.counts.gather(1, layout.kept.clamp(min=0))
        score = attention_from_rows(x, layout, block, rotary)
        return select_top(score, layout, original * share.numerator // share.denominator)


def is_picture(layout: Layout) -> Tensor:
    """[n, T] bool: valid visual positions."""
    return layout.mask & (layout.modality == int(Modality.IMAGE))


def picture_counts(layout: Layout) -> Tensor:
    """[n, T]: how many positions the picture of a position has in its row; 0 for text and padding."""
    row, at = is_picture(layout).nonzero(as_tuple=True)
    _, group, count = torch.unique(
        torch.stack([row, layout.picture[row, at]]), dim=1, return_inverse=True, return_counts=True
    )
    out = torch.zeros_like(layout.picture)
    out[row, at] = count[group]
    return out


def select_top(score: Tensor, layout: Layout, counts: Tensor) -> Tensor:
    """Text, and of each picture of a row the `counts` best positions: [n, K] ascending, -1 padded right.

    score [n, T], inf: stays whatever the count; counts [n, T], at each visual position the number for its picture.
    Equal scores go to the lower position.
    """
    judged = is_picture(layout) & torch.isfinite(score)
    row, at = judged.nonzero(as_tuple=True)  # row by row, ascending
    group = row * (int(layout.picture.max()) + 1 if len(row) else 1) + layout.picture[row, at]
    order = torch.argsort(score[row, at], descending=True, stable=True)
    order = order[torch.argsort(group[order], stable=True)]
    place = torch.arange(len(order), device=score.device)
    new = torch.ones_like(order, dtype=torch.bool)
    new[1:] = group[order][1:] != group[order][:-1]
    rank = place - torch.where(new, place, 0).cummax(0).values if len(order) else place
    keep = layout.mask & ~judged
    keep[row[order], at[order]] = rank < counts[row, at][order]
    return rows_first(keep)
