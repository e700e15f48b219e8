"""Who sees whom in one pass of a trunk with masks: made once, used by every layer.

n rows, N queries, M keys, S first tokens. Valid keys of a row stand together, so that places differ as ranks do; queries
are the last N of the M keys. Sources: lm-infinite (far first tokens), budget-longformer (global tokens).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.attention import TrunkAttentionOptions
from vlm.ops import masks


@dataclass(frozen=True)
class Ranks:
    """Rank of every position in its document [n, M], -1 at padding; document [n, M], None where a row is one."""

    rank: Tensor
    document: Tensor | None = None

    @classmethod
    def of(cls, mask: Tensor, segment: Tensor | None) -> Ranks:
        """mask bool [n, M]; segment [n, M] numbers packed documents, None without."""
        count = mask.cumsum(1) - 1
        if segment is None:
            return cls(torch.where(mask, count, -1))
        starts = mask.clone()
        starts[:, 1:] &= (segment[:, 1:] != segment[:, :-1]) | ~mask[:, :-1]
        first = torch.where(starts, count, 0).cummax(1).values
        return cls(torch.where(mask, count - first, -1), starts.cumsum(1))


@dataclass(frozen=True)
class Far:
    """First tokens beyond the window: index [n, S] their places among the keys, None where they are kept apart; allow bool
    [n, N, S]; distance [n, N, S], query minus key."""

    allow: Tensor
    distance: Tensor
    index: Tensor | None = None


@dataclass(frozen=True)
class Heads:
    """Global tokens that look with projections of their own: index [n, S], valid bool [n, S], allow bool [n, S, M]."""

    index: Tensor
    valid: Tensor
    allow: Tensor


@dataclass(frozen=True)
class Sight:
    """causal, key_mask and program of the near keys; far first tokens; global tokens with projections of their own."""

    causal: bool
    key_mask: Tensor | None
    program: masks.MaskProgram | None
    far: Far | None = None
    heads: Heads | None = None


def sight_of(options: TrunkAttentionOptions, causal: bool, mask: Tensor, ranks: Ranks, queries: int | None = None,
             kept: Tensor | None = None) -> Sight:
    """mask bool [n, M] and ranks of the keys; queries: the last of them that look, default all.

    kept: rank of first tokens that are kept apart [n, S], -1 where there is none yet; without it they are found among the keys.
    """
    causal = causal or options.one_way
    rank, document = ranks.rank, ranks.document
    length = rank.shape[1]
    queries = length if queries is None else queries
    looking = rank[:, length - queries :]
    # In causal rows padded on the right alone nothing valid looks at padding.
    tail = causal and queries == length and not bool((mask[:, 1:] & ~mask[:, :-1]).any())
    key_mask = None if tail or bool(mask.all()) else mask
    atoms: list[masks.Atom] = []
    longest = int(rank.max()) if rank.numel() else -1
    narrow = options.reach is not None and longest >= options.reach
    if narrow and options.near is not None:
        reach = options.reach
        assert reach is not None
        atoms.append(masks.Window(reach, causal=causal))
        if options.global_tokens:
            is_global = (rank >= 0) & (rank < options.global_tokens)
            looks = torch.zeros_like(is_global) if options.global_projections else is_global
            atoms.append(masks.GlobalTokens(looks[:, length - queries :], is_global))
    if document is not None:
        atoms.append(masks.Segments(document[:, length - queries :], document))
    far = _far(options, ranks, looking, kept) if narrow and options.sinks else None
    heads = _heads(options, causal, ranks) if options.global_projections else None
    return Sight(causal, key_mask, masks.MaskProgram(*atoms) if atoms else None, far, heads)


def first_places(rank: Tensor, count: int) -> Tensor:
    """Places of the positions of rank below `count` in rows of ranks [n, M] -> [n, S] ascending, -1 padded right."""
    chosen = (rank >= 0) & (rank < count)
    slots = int(chosen.sum(1).max()) if rank.numel() else 0
    order = torch.argsort((~chosen).to(torch.int8), dim=1, stable=True)[:, :slots]
    return torch.where(chosen.gather(1, order), order, -1)


def _far(options: TrunkAttentionOptions, ranks: Ranks, looking: Tensor, kept: Tensor | None) -> Far | None:
    index = None
    if kept is None:
        index = first_places(ranks.rank, options.sinks)
        kept = torch.where(index >= 0, ranks.rank.gather(1, index.clamp(min=0)), -1)
    distance = looking[:, :, None] - kept[:, None, :]
    assert options.reach is not None
    allow = (distance >= options.reach) & (kept >= 0)[:, None, :]
    if index is not None and ranks.document is not None:
        assert looking.shape == ranks.document.shape
        own = ranks.document.gather(1, index.clamp(min=0))
        allow = allow & (ranks.document[:, :, None] == own[:, None, :])
    return Far(allow, distance, None if index is None else index.clamp(min=0)) if bool(allow.any()) else None


def _heads(options: TrunkAttentionOptions, causal: bool, ranks: Ranks) -> Heads:
    index = first_places(ranks.rank, options.global_tokens)
    valid, at = index >= 0, index.clamp(min=0)
    allow = (ranks.rank >= 0)[:, None, :] & valid[:, :, None]
    if causal:
        allow = allow & (at[:, :, None] >= torch.arange(ranks.rank.shape[1], device=at.device))
    if ranks.document is not None:
        allow = allow & (ranks.document.gather(1, at)[:, :, None] == ranks.document[:, None, :])
    return Heads(at, valid, allow)


__all__ = ["Far", "Heads", "Ranks", "Sight", "first_places", "sight_of"]
