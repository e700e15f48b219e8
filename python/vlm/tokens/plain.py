"""The operators of token reduction in plain torch, made of operations that export: the same names, arguments and results
as those of `vlm.ops`.

B batch, H query heads, G key/value heads, N queries or tokens, M keys, D width of a head, C width, r pairs merged.
Sources: aim, fopru, core-tome, core-select.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Alignment = Literal["bottom-right", "top-left"]
MatchOrder = Literal["sources-first", "position", "similarity"]
MergeWeighting = Literal["size", "mean"]


class Matching(NamedTuple):
    """What one round of merging does, all int64 and constant for gradients.

    source, target [B, r]: tokens that are merged, by falling cosine, and the tokens they are merged into. kept [B, N - r]: the
    tokens that stay, in their new order. assign [B, N]: the new place of every token.
    """

    source: Tensor
    target: Tensor
    kept: Tensor
    assign: Tensor


class Selection(NamedTuple):
    """indices int64 [B, K], strictly rising; counts int64 [B]: how many of them are real."""

    indices: Tensor
    counts: Tensor


# Statistics of an attention map, which is never handed out


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    alignment: Alignment = "bottom-right",
    key_mask: Tensor | None = None,
    scale: float | None = None,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Attention that each key receives, sum_i w_i exp(s_ij / t - L_i): q [B, H, N, D], k [B, G, M, D] -> [B, H, M].

    s = scale * q k^T over the allowed keys (masked first, divided by the temperature t after), L_i the log of the softmax
    denominator or `lse` [B, H, N] where it is known; weights broadcastable to [B, H, N], 1 by default. A query with no
    allowed key adds nothing. Half precision is computed in float32. Not differentiable.
    """
    with torch.no_grad():
        p = _probabilities(q, k, causal, alignment, key_mask, scale, temperature, lse)
        if weights is None:
            return p.sum(2)
        return (weights.to(p.dtype).expand(p.shape[:3])[:, :, None] @ p)[:, :, 0]


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    *,
    temperature: float = 1.0,
    iterations: int = 5,
    damping: float = 0.0,
    causal: bool = False,
    alignment: Alignment = "bottom-right",
    key_mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """x of `iterations` steps x' = (1 - damping) x P + damping x_0 for each head: q [B, H, N, D], k [B, G, N, D] -> [B, H, N].

    P is the softmax of the logits over the temperature, x_0 equal over the allowed keys; each x sums to 1. Source: aim.
    """
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"{q.shape[2]} queries and {k.shape[2]} keys: the walk needs as many of one as of the other")
    with torch.no_grad():
        p = _probabilities(q, k, causal, alignment, key_mask, scale, temperature, None)
        valid = torch.ones_like(p[:, 0, 0]) if key_mask is None else key_mask.to(p.dtype)
        start = (valid / valid.sum(-1, keepdim=True).clamp(min=1))[:, None].expand(p.shape[:2] + valid.shape[1:])
        x = start
        for _ in range(iterations):
            x = (x[:, :, None] @ p)[:, :, 0]
            if damping:
                x = (1 - damping) * x + damping * start
        return x


def attention_lse(q: Tensor, k: Tensor) -> Tensor:
    """log sum_j exp(s_ij) over all keys: q [B, H, N, D], k [B, G, M, D] -> [B, H, N]. Not differentiable."""
    with torch.no_grad():
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return (q.to(wide) @ _repeated(k.to(wide), q).transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1)


def _repeated(k: Tensor, q: Tensor) -> Tensor:
    """k [B, G, M, D] for every head of q."""
    repeat = q.shape[1] // k.shape[1]
    return k if repeat == 1 else k[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(k.shape[0], -1, k.shape[2], k.shape[3])


def _probabilities(
    q: Tensor,
    k: Tensor,
    causal: bool,
    alignment: Alignment,
    key_mask: Tensor | None,
    scale: float | None,
    temperature: float,
    lse: Tensor | None,
) -> Tensor:
    """[B, H, N, M], 0 where a pair is not allowed."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), _repeated(k.to(wide), q)
    n, m = q.shape[2], k.shape[2]
    sees = torch.ones(1, 1, n, m, dtype=torch.bool, device=q.device)
    if causal:
        offset = m - n if alignment == "bottom-right" else 0
        sees = (torch.arange(m, device=q.device) <= torch.arange(n, device=q.device)[:, None] + offset)[None, None]
    if key_mask is not None:
        k = torch.where(key_mask[:, None, :, None], k, 0.0)  # what is masked may be anything
        sees = sees & key_mask[:, None, None, :]
    logits = q @ k.transpose(-1, -2) * ((q.shape[-1] ** -0.5 if scale is None else scale) / temperature)
    low = torch.finfo(wide).min
    logits = torch.where(sees, logits, low)
    p = logits.softmax(-1) if lse is None else (logits - lse.to(wide)[..., None]).exp()
    return torch.where(sees, p, 0.0)


# Merging


@torch.no_grad()
def bipartite_match(metric: Tensor, r: int, protect: int = 1, *, order: MatchOrder = "sources-first") -> Matching:
    """The r most similar pairs of an even token (source) and an odd one (destination), by the cosine of metric [B, N, D], or
    [B, H, N, D] for the mean over heads.

    protect: so many leading tokens are neither merged nor merged into. order: of the kept tokens; sources-first: even ones, then
    odd ones, by index; position: all by index; similarity: even ones by falling cosine, then odd ones. Equal cosines: the lower
    index; NaN is least. With r = 0 nothing moves. Raises ValueError for r above (N - protect) // 2.
    """
    metric = metric.mean(1) if metric.ndim == 4 else metric
    batch, n = metric.shape[:2]
    if protect < 0 or not 0 <= r <= max(n - protect, 0) // 2:
        raise ValueError(f"r is {r}, expected 0 to {max(n - protect, 0) // 2} for {n} tokens of which {protect} are protected")
    place = torch.arange(n, device=metric.device).expand(batch, -1)
    if not r:
        return Matching(place[:, :0], place[:, :0], place, place)
    unit = metric.to(torch.float64 if metric.dtype == torch.float64 else torch.float32)
    unit = unit * torch.rsqrt((unit * unit).sum(-1, keepdim=True).clamp(min=1e-24))
    cosine = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    guarded = place[0] < protect
    cosine = torch.where(cosine.isnan() | guarded[::2, None] | guarded[1::2], -torch.inf, cosine)
    score, partner = cosine.max(-1)
    by_cosine = best_first(score)
    source = 2 * by_cosine[:, :r]
    target = 2 * partner.gather(1, by_cosine[:, :r]) + 1
    if order == "position":
        gone = torch.zeros_like(place).scatter(1, source, 1)
        kept = torch.sort(gone * n + place, dim=1).indices[:, : n - r]
    else:
        rest = by_cosine[:, r:] if order == "similarity" else torch.sort(by_cosine[:, r:], dim=1).values
        if order == "similarity" and protect:  # those that are protected lead, though they are like nothing
            rest = rest.roll((protect + 1) // 2, dims=1)
        kept = torch.cat([2 * rest, place[:, 1::2]], dim=1)
    assign = torch.zeros_like(place).scatter(1, kept, place[:, : n - r])
    return Matching(source, target, kept, assign.scatter(1, source, assign.gather(1, target)))


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching, weighting: MergeWeighting = "size") -> tuple[Tensor, Tensor]:
    """x [B, N, C], sizes [B, N] (1 where None) -> (x' [B, N - r, C], sizes' [B, N - r]), in the order of `matching.kept`.

    size: mean weighted by how many tokens each stands for, so that sum(size * x) stays; mean: plain mean of a slot's tokens.
    Sizes are summed either way. A token that nothing joins keeps its bits. Gradients pass through the mean; choice and sizes
    carry none.
    """
    sizes = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device) if sizes is None else sizes.detach()
    empty = sizes.new_zeros(x.shape[0], matching.kept.shape[1])
    totals = empty.scatter_add(1, matching.assign, sizes)
    counts = empty.scatter_add(1, matching.assign, torch.ones_like(sizes))
    weights, whole = (sizes, totals) if weighting == "size" else (torch.ones_like(sizes), counts)
    rows = matching.assign[..., None].expand(-1, -1, x.shape[-1])
    summed = x.new_zeros(*totals.shape, x.shape[-1]).scatter_add(1, rows, x * weights[..., None].to(x.dtype))
    merged = summed / whole[..., None].to(x.dtype)
    return torch.where((counts > 1)[..., None], merged, gather_tokens(x, matching.kept)), totals


def unmerge_tokens(x: Tensor, matching: Matching | Tensor) -> Tensor:
    """x [B, N - r, C] -> [B, N, C]: every token gets what it became part of. matching: one round, or an `assign` of several."""
    return gather_tokens(x, matching.assign if isinstance(matching, Matching) else matching)


def compose_assignments(first: Tensor, then: Tensor) -> Tensor:
    """`assign` [B, N] of two rounds, the second over what the first left."""
    return then.gather(1, first)


# Choosing


def best_first(score: Tensor) -> Tensor:
    """Indices of score [..., N] by falling score, of equal ones the lower first."""
    if torch.compiler.is_exporting():  # a stable sort has no graph; the one that there is keeps equal ones in order
        return torch.sort(score, dim=-1, descending=True).indices
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


@torch.no_grad()
def select_top(scores: Tensor, k: int) -> Selection:
    """The k best of scores [B, N], of equal ones the lower index, NaN last."""
    ranked = torch.where(scores.isnan(), -torch.inf, scores)
    indices = torch.sort(best_first(ranked)[:, :k], dim=1).values
    return Selection(indices, torch.full_like(indices.sum(1), indices.shape[1]))


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C] at index [B, K], 0 where the index is -1; backward scatters to the chosen tokens alone."""
    taken = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return taken.masked_fill((index < 0)[..., None], 0.0)
