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
Weighting = Literal["size", "mean"]


class Matching(NamedTuple):
    """Pairs of tokens that become one. Tokens stand alternately in A (even indices) and B (odd ones).

    kept [B, ceil(N/2) - r] indices in A that stay, ascending; source [B, r] indices in A that are merged, best first; target
    [B, r] the index in B that each goes into; score [B, ceil(N/2)] cosine of each token of A to its best partner, -inf for
    protected ones.
    """

    kept: Tensor
    source: Tensor
    target: Tensor
    score: Tensor


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


def _probabilities(
    q: Tensor, k: Tensor, causal: bool, alignment: Alignment, key_mask: Tensor | None, scale: float | None, temperature: float, lse: Tensor | None
) -> Tensor:
    """[B, H, N, M], 0 where a pair is not allowed."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    q, k = q.to(wide), k.to(wide)
    repeat = q.shape[1] // k.shape[1]
    if repeat > 1:
        k = k[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(k.shape[0], -1, k.shape[2], k.shape[3])
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


def bipartite_match(metric: Tensor, r: int, protect: int = 1) -> Matching:
    """The r most similar pairs by the cosine of metric [B, N, D]: each token of A has one partner, the nearest of B.

    protect: so many leading tokens stay what they are. r is cut to what can be merged, (N - protect) // 2. Equal cosines:
    the lower index. NaN counts as least similar.
    """
    n = metric.shape[1]
    r = max(0, min(r, (n - protect) // 2))
    with torch.no_grad():
        unit = metric.to(torch.float64 if metric.dtype == torch.float64 else torch.float32)
        unit = unit * torch.rsqrt((unit * unit).sum(-1, keepdim=True).clamp(min=1e-24))
        a, b = unit[:, ::2], unit[:, 1::2]
        cosine = a @ b.transpose(-1, -2)
        cosine = torch.where(cosine.isnan(), -torch.inf, cosine)
        left = 2 * torch.arange(a.shape[1], device=metric.device) < protect
        right = 2 * torch.arange(b.shape[1], device=metric.device) + 1 < protect
        cosine = torch.where(left[:, None] | right, -torch.inf, cosine)
        if not b.shape[1]:
            none = torch.zeros(metric.shape[0], 0, dtype=torch.int64, device=metric.device)
            every = torch.arange(a.shape[1], device=metric.device).expand(metric.shape[0], -1)
            return Matching(every, none, none, torch.full_like(a[..., 0], -torch.inf))
        score, partner = cosine.max(-1)
        order = best_first(score)
        source = order[:, :r]
        kept = torch.sort(order[:, r:], dim=-1).values
        return Matching(kept, source, partner.gather(1, source), score)


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching, weighting: Weighting = "size") -> tuple[Tensor, Tensor]:
    """x [B, N, C], sizes [B, N] (1 where None) -> (x' [B, N - r, C], sizes'): the kept tokens of A in order, then B.

    size: mean weighted by how many tokens each stands for, so that sum(size * x) stays; mean: plain mean of the partner
    and all that are merged into it. Gradients pass through the mean; choice and sizes carry none.
    """
    sizes = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device) if sizes is None else sizes
    if not matching.source.shape[1]:
        return x, sizes
    source, target = matching.source, matching.target
    a, b, size_a, size_b = x[:, ::2], x[:, 1::2], sizes[:, ::2], sizes[:, 1::2]
    moved = size_a.gather(1, source)
    total = size_b.scatter_add(1, target, moved)
    taken = _at(a, source)
    if weighting == "size":
        summed = (b * size_b[..., None]).scatter_add(1, _wide(target, x), taken * moved[..., None])
        merged = summed / total[..., None]
        counted = torch.zeros_like(size_b).scatter_add(1, target, torch.ones_like(moved))
    else:
        counted = torch.zeros_like(size_b).scatter_add(1, target, torch.ones_like(moved))
        merged = b.scatter_add(1, _wide(target, x), taken) / (1 + counted)[..., None]
    merged = torch.where((counted > 0)[..., None], merged, b)  # what nothing joined keeps its bits
    kept = matching.kept
    return torch.cat([_at(a, kept), merged], dim=1), torch.cat([size_a.gather(1, kept), total], dim=1)


def merged_places(matching: Matching, tokens: int) -> Tensor:
    """[B, N]: the place after `merge_tokens` of what each of the N tokens became part of."""
    batch = matching.source.shape[0]
    device = matching.source.device
    if not matching.source.shape[1]:
        return torch.arange(tokens, device=device).expand(batch, -1)
    first, second = (tokens + 1) // 2, tokens // 2
    staying = matching.kept.shape[1]
    left = torch.zeros(batch, first, dtype=torch.int64, device=device)
    left = left.scatter(1, matching.kept, torch.arange(staying, device=device).expand(batch, -1))
    left = left.scatter(1, matching.source, matching.target + staying)
    right = (torch.arange(second, device=device) + staying).expand(batch, -1)
    if first > second:
        right = torch.cat([right, right[:, :1]], dim=1)
    return torch.stack([left, right], dim=2).reshape(batch, -1)[:, :tokens]


def unmerge_tokens(x: Tensor, places: Tensor) -> Tensor:
    """x [B, N', C] at places [B, N], as `merged_places` gives them: every token gets what it became part of."""
    return _at(x, places)


# Choosing


def best_first(score: Tensor) -> Tensor:
    """Indices of score [..., N] by falling score, of equal ones the lower first."""
    if torch.compiler.is_exporting():  # a stable sort has no graph; the one that there is keeps equal ones in order
        return torch.sort(score, dim=-1, descending=True).indices
    return torch.sort(score, dim=-1, descending=True, stable=True).indices


def select_top(score: Tensor, k: int) -> Tensor:
    """The k best of score [B, N], of equal ones the lower index, NaN last: indices [B, k], ascending."""
    ranked = torch.where(score.isnan(), -torch.inf, score)
    order = best_first(ranked)[:, :k]
    return torch.sort(order, dim=-1).values


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [B, N, C] at index [B, K], 0 where the index is -1; backward scatters to the chosen tokens alone."""
    taken = x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[-1]))
    return taken.masked_fill((index < 0)[..., None], 0.0)


def _wide(index: Tensor, x: Tensor) -> Tensor:
    return index[..., None].expand(-1, -1, x.shape[-1])


def _at(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, _wide(index, x))
