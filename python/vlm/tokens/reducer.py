"""Dropping positions of pictures between the layers of a decoder. Sources: pyramiddrop, aim, vision-token-search.

n rows, T positions, K kept ones, C width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vlm.tokens.schedule import KeepPlan
from vlm.tokens.score import Rotary, ScoringBlock, attention_from_rows, query_rows, rows_first
from vlm.tokens.score_options import AttentionFromRowsOptions, View
from vlm.types import Layout
from vlm.types.layout import Modality

if TYPE_CHECKING:
    from vlm.tokens.score_options import DecoderScore


class TokenReducer:
    """The reducer of one pass: it remembers how many positions each picture had before any drop.

    at_least: a position stays only if its score reaches so many times the mean of its picture's; None: no such bound.
    """

    def __init__(
        self, layout: Layout, plan: KeepPlan, score: DecoderScore, *, renumber: bool, at_least: float | None = None
    ) -> None:
        self.plan, self.score, self.at_least = plan, score, at_least
        self.renumber = renumber
        self.counts = picture_counts(layout)
        self.numbers = picture_numbers(layout)

    def layers(self) -> frozenset[int]:
        return frozenset(self.plan.shares)

    def __call__(
        self,
        layer: int,
        x: Tensor,
        layout: Layout,
        block: ScoringBlock,
        rotary: Rotary | None,
        before: tuple[Tensor, ScoringBlock],
    ) -> Tensor:
        """Positions that stay after `layer`, [n, K] ascending, -1 padded right; block is the next to run, before is what
        the last one read and that block."""
        share = self.plan.shares[layer]
        original = self.counts.gather(1, layout.kept.clamp(min=0))
        counts = (original * share.numerator // share.denominator).clamp(min=self.plan.least).minimum(original)
        if bool((counts >= picture_counts(layout)).all()) and self.at_least is None:  # nothing to judge
            return rows_first(layout.mask)
        score = self._scores(x, layout, block, rotary, before)
        if self.at_least is not None:
            counts = counts.minimum(_reaching(score, layout, self.at_least).clamp(min=self.plan.least))
        return select_top(score, layout, counts)

    @torch.no_grad()
    def _scores(
        self, x: Tensor, layout: Layout, block: ScoringBlock, rotary: Rotary | None, before: tuple[Tensor, ScoringBlock]
    ) -> Tensor:
        """[n, T] float32, inf where nothing speaks against a position: no text follows it."""
        if isinstance(self.score, AttentionFromRowsOptions):
            if self.score.norm == "previous-layer":
                x, block = before
            return attention_from_rows(x, layout, block, rotary)
        scope = before_last_text(layout)
        number = self.numbers.gather(1, layout.kept.clamp(min=0))
        text = layout.mask & (layout.modality != int(Modality.IMAGE))
        view = View(x, before[0], before[1], block, rotary, scope, number, text)
        if not bool((layout.segment > 0).any()):
            score = self.score.score(view)
        else:  # packed documents, each in a row of its own
            fold = folded(layout)
            at, real = fold.clamp(min=0), fold >= 0
            parts = None if rotary is None else (_laid(rotary[0], layout, at), _laid(rotary[1], layout, at))
            own = View(
                _rows(x, at), _rows(before[0], at), before[1], block, parts, _rows(scope, at) & real, _rows(number, at), _rows(text, at)
            )
            score = torch.zeros(layout.mask.shape, device=x.device).flatten()
            score[fold[real]] = self.score.score(own)[real]
            score = score.view(layout.mask.shape)
        return torch.where(scope, score, torch.inf)


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


def picture_numbers(layout: Layout) -> Tensor:
    """[n, T]: the number of a visual position in its picture, from 0; anything elsewhere."""
    place = torch.arange(layout.mask.shape[1], device=layout.mask.device).expand_as(layout.picture)
    new = torch.ones_like(layout.mask)
    new[:, 1:] = layout.picture[:, 1:] != layout.picture[:, :-1]
    first = torch.where(new, place, 0)
    return place - (first.cummax(1).values if first.shape[1] else first)


def before_last_text(layout: Layout) -> Tensor:
    """[n, T] bool: valid positions up to the last query row of their document, that row included."""
    length = layout.mask.shape[1]
    place = torch.arange(length, device=layout.mask.device).expand_as(layout.mask)
    asks = torch.where(query_rows(layout), place, length)
    following = asks.flip(1).cummin(1).values.flip(1) if length else asks
    same = layout.segment.gather(1, following.clamp(max=max(length - 1, 0))) == layout.segment
    return layout.mask & (following < length) & same


def folded(layout: Layout) -> Tensor:
    """[R, K]: for each document of packed rows its positions in the flattened rows n * T, -1 padded right."""
    row, at = layout.mask.nonzero(as_tuple=True)
    key = row * (int(layout.segment.max()) + 1) + layout.segment[row, at]
    _, group, counts = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
    place = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[group]
    out = torch.full((len(counts), int(counts.max())), -1, dtype=torch.int64, device=key.device)
    out[group, place] = row * layout.mask.shape[1] + at
    return out


def select_top(score: Tensor, layout: Layout, counts: Tensor) -> Tensor:
    """Text, and of each picture of a row the `counts` best positions: [n, K] ascending, -1 padded right.

    score [n, T], inf: stays whatever the count; counts [n, T], at each visual position the number for its picture.
    Equal scores go to the lower position; NaN counts as least.
    """
    score = torch.where(score.isnan(), torch.finfo(torch.float32).min, score)
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


def _reaching(score: Tensor, layout: Layout, times: float) -> Tensor:
    """[n, T]: how many judged positions of a position's picture reach so many times the mean of its scores."""
    judged = is_picture(layout) & torch.isfinite(score)
    row, at = judged.nonzero(as_tuple=True)
    _, group = torch.unique(torch.stack([row, layout.picture[row, at]]), dim=1, return_inverse=True)
    size = int(group.max()) + 1 if len(group) else 0
    own = score[row, at].double()
    mean = own.new_zeros(size).index_add(0, group, own) / torch.bincount(group, minlength=size).clamp(min=1)
    reaches = own >= times * mean[group]
    out = torch.zeros_like(layout.picture)
    out[row, at] = torch.bincount(group[reaches], minlength=size)[group]
    return out


def _rows(tensor: Tensor, at: Tensor) -> Tensor:
    """[n, T, ...] at places [R, K] of the flattened rows."""
    return tensor.flatten(0, 1)[at]


def _laid(table: Tensor, layout: Layout, at: Tensor) -> Tensor:
    """A rotary table [n or 1, 1, T, D] as [R, 1, K, D]."""
    return _rows(table.expand(len(layout.mask), -1, -1, -1)[:, 0], at)[:, None]
