"""Scores of positions: how much the query rows of an instruction attend them. Source: pyramiddrop.

n rows, T positions, Q query rows, H heads, D head width, C width.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from vlm.types import Layout
from vlm.types.batch import Role
from vlm.types.layout import Modality

Rotary = tuple[Tensor, Tensor]


class ScoringAttention(Protocol):
    """What a score needs of a layer's attention."""

    head_width: int

    def queries(self, x: Tensor, rotary: Rotary | None = None) -> Tensor: ...

    def keys(self, x: Tensor, rotary: Rotary | None = None) -> Tensor: ...


class ScoringBlock(Protocol):
    """A pre-norm block: its input norm and its attention."""

    norm1: Any

    @property
    def attention(self) -> ScoringAttention: ...


def query_rows(layout: Layout) -> Tensor:
    """[n, T] bool: the last position of text before each answer; in a prompt that waits for its answer, the last one.

    The markup of a template that leads to an answer belongs to the turn, so the row is the same in training and on the
    bare prompt. A prompt waits where an instruction follows the last answer of its document.
    """
    text = layout.mask & (layout.modality != int(Modality.IMAGE))
    answer = text & (layout.role == int(Role.ANSWER))
    asked = text & (layout.role == int(Role.INSTRUCTION))
    length = layout.mask.shape[1]
    place = torch.arange(length, device=layout.mask.device).expand_as(layout.mask)
    # The next position of text: the smallest index to the right, `length` where there is none.
    here = torch.where(text, place, length)
    after = torch.full_like(here, length)
    after[:, :-1] = here[:, 1:].flip(1).cummin(1).values.flip(1)
    at = after.clamp(max=max(length - 1, 0))
    follows = (after < length) & (layout.segment.gather(1, at) == layout.segment)
    starts = torch.ones_like(layout.mask)
    starts[:, 1:] = layout.segment[:, 1:] != layout.segment[:, :-1]
    first, last_answer, last_asked = (
        torch.where(chosen, place, -1).cummax(1).values for chosen in (starts, answer, asked)
    )
    waits = ~follows & (last_asked >= first) & (last_asked > last_answer)
    return text & ~answer & ((follows & answer.gather(1, at)) | waits)


@torch.no_grad()
def attention_from_rows(x: Tensor, layout: Layout, block: ScoringBlock, rotary: Rotary | None) -> Tensor:
    """x [n, T, C] -> scores [n, T] float32 of the attention that `block`, the next to run, would pay.

    softmax(q k^T / sqrt(D)) over the whole causal prefix of the query's document, mean over heads and over the document's
    queries. Positions that no query sees get inf: nothing speaks against them.
    """
    asks = query_rows(layout)
    chosen = rows_first(asks)
    if not chosen.shape[1]:
        return torch.full(layout.mask.shape, torch.inf, device=x.device)
    real, at = chosen >= 0, chosen.clamp(min=0)
    y = block.norm1(x)
    picked = at[..., None].expand(-1, -1, y.shape[-1])
    q = block.attention.queries(y.gather(1, picked), _at(rotary, at)).float()
    k = block.attention.keys(y, rotary).float()
    repeat = q.shape[1] // k.shape[1]
    logits = q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) * block.attention.head_width**-0.5
    place = torch.arange(x.shape[1], device=x.device)
    same = layout.segment.gather(1, at)[:, :, None] == layout.segment[:, None, :]
    sees = same & layout.mask[:, None, :] & real[:, :, None] & (place <= at[:, :, None])
    logits = logits.masked_fill(~sees[:, None], -torch.inf)
    weights = torch.where(sees, logits.softmax(-1).nan_to_num(0.0).mean(1), 0.0)
    queries = (same & real[:, :, None]).sum(1).clamp(min=1)
    return torch.where(sees.any(1), weights.sum(1) / queries, torch.inf)


def rows_first(keep: Tensor) -> Tensor:
    """Indices of the true positions of keep [n, T], ascending, -1 padded right: [n, K]."""
    count = keep.sum(1)
    size = int(count.max()) if len(count) else 0
    order = torch.argsort((~keep).to(torch.int8), dim=1, stable=True)[:, :size]
    return torch.where(torch.arange(size, device=keep.device) < count[:, None], order, -1)


def _at(rotary: Rotary | None, at: Tensor) -> Rotary | None:
    """The tables [n, 1, T, D] at positions at [n, Q]."""
    if rotary is None:
        return None
    cos, sin = (
        table.expand(len(at), -1, -1, -1)[:, 0].gather(1, at[..., None].expand(-1, -1, table.shape[-1]))[:, None]
        for table in rotary
    )
    return cos, sin
