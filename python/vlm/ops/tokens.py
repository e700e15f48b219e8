"""Token reduction: matching, merging and moving rows. B batch, N tokens, K kept ones, C width.

Selection of tokens by score is in `tokens_select`, pooling in `tokens_pool`. Indices are int64, what torch's own
indexing takes. Sources: core-tome, core-select, aim.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vlm.ops.backend import always, one_device, use_native
from vlm.ops.tokens_native import native_gather, native_match, native_merge_weights, native_scatter
from vlm.ops.tokens_reference import (
    gather_reference,
    match_reference,
    merge_weights_reference,
    scatter_reference,
)

MatchOrder = Literal["sources-first", "position", "similarity"]
MergeWeighting = Literal["size", "mean"]
_ORDERS: tuple[MatchOrder, ...] = ("sources-first", "position", "similarity")


class Matching(NamedTuple):
    """What one round of merging does, all int64 and constant for gradients.

    source, target [B, r]: tokens that are merged, by falling cosine, and the tokens they are merged into.
    kept [B, N - r]: the tokens that stay, in their new order. assign [B, N]: the new place of every token.
    """

    source: Tensor
    target: Tensor
    kept: Tensor
    assign: Tensor


@torch.no_grad()
def bipartite_match(metric: Tensor, r: int, protect: int = 1, *, order: MatchOrder = "sources-first") -> Matching:
    """The r most similar pairs of an even token (source) and an odd one (destination), by cosine.

    metric: [B, N, D], or [B, H, N, D] for the mean over heads (ToMe: the attention keys), which is then taken inside.
    protect: that many leading tokens (class, distill) are neither merged nor merged into.
    order: of the kept tokens: "sources-first", kept even ones then odd ones, by index (ToMe); "position", all by index;
        "similarity", kept even ones by falling cosine then odd ones by index (the released code of AIM).
    Equal cosines go to the lowest index; a NaN cosine counts as -inf. r is at most (N - protect) // 2, ValueError beyond.
    Half precision is converted to float32 as a whole. Source: core-tome.
    """
    if metric.ndim not in (3, 4) or not metric.is_floating_point():
        raise ValueError(f"bipartite_match wants a floating metric [B, N, D] or [B, H, N, D], got {metric.dtype} {tuple(metric.shape)}")
    if metric.ndim == 4 and metric.shape[1] == 0:
        raise ValueError("bipartite_match: the metric has no heads")
    if order not in _ORDERS:
        raise ValueError(f"bipartite_match: order is {order!r}; expected one of {', '.join(_ORDERS)}")
    if protect < 0 or not 0 <= r <= max(metric.shape[-2] - protect, 0) // 2:
        raise ValueError(f"bipartite_match: r is {r}, expected 0 to {max(metric.shape[-2] - protect, 0) // 2} for "
                         f"{metric.shape[-2]} tokens of which {protect} are protected")
    if use_native(metric, cuda=always):
        return Matching(*native_match(metric.float(), r, protect, _ORDERS.index(order)))
    with torch.autocast(metric.device.type, enabled=False):
        return Matching(*match_reference(metric.mean(1) if metric.ndim == 4 else metric, r, protect, order))


def merge_tokens(x: Tensor, sizes: Tensor | None, matching: Matching,
                 weighting: MergeWeighting = "size") -> tuple[Tensor, Tensor]:
    """x [B, N, C], sizes [B, N] (None: all 1) -> merged [B, N - r, C] in x's type, sizes [B, N - r], at least float32.

    weighting "size": sum s x / sum s over each slot (ToMe); "mean": the plain mean of its tokens (AIM). Sizes are summed
    either way. A token that nothing meets is copied bit for bit. A token of size 0 is not read where its slot has others.
    Differentiable in x; sizes are constants. Half precision is merged in float32, converted as a whole.
    """
    _rows("merge_tokens", x, matching.assign)
    if weighting not in ("size", "mean"):
        raise ValueError(f"merge_tokens: weighting is {weighting!r}; expected 'size' or 'mean'")
    if sizes is not None and sizes.shape != x.shape[:2]:
        raise ValueError(f"merge_tokens: sizes must be {tuple(x.shape[:2])}, got {tuple(sizes.shape)}")
    one_device("merge_tokens", x, sizes)
    slots, by_size, work = matching.kept.shape[1], weighting == "size", torch.promote_types(x.dtype, torch.float32)
    sizes = None if sizes is None else sizes.detach().to(work)
    if use_native(x, cuda=always):
        weights, totals = native_merge_weights(matching.assign, sizes, slots, by_size)
        return native_scatter(x.float(), matching.assign, weights, slots).to(x.dtype), totals
    with torch.autocast(x.device.type, enabled=False):
        sizes = torch.ones(x.shape[:2], dtype=work, device=x.device) if sizes is None else sizes
        weights, totals = merge_weights_reference(matching.assign, sizes, slots, by_size)
        return scatter_reference(x.to(work), matching.assign, weights, slots).to(x.dtype), totals


def unmerge_tokens(x: Tensor, matching: Matching | Tensor) -> Tensor:
    """Every token gets the row of its slot: x [B, K, C] -> [B, N, C]; differentiable in x.

    matching: one round, or an `assign` [B, N] of several composed by `compose_assignments`.
    """
    return gather_tokens(x, matching.assign if isinstance(matching, Matching) else matching)


def compose_assignments(first: Tensor, then: Tensor) -> Tensor:
    """assign [B, N] of one round and [B, K] of the next -> the places [B, N] after both."""
    return then.gather(1, first)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, N, ...] by index int64 [B, K] -> [B, K, ...]; an index of -1 gives zeros.

    Any type (ids, masks and positions, too), copied as it is; differentiable in x where x is floating: the gradient of a
    row is the sum over its copies. Source: core-select.
    """
    if x.ndim < 2:
        raise ValueError(f"gather_tokens wants x of 2 axes or more [B, N, ...], got {tuple(x.shape)}")
    flat = x.flatten(2) if x.ndim > 2 else x[..., None]
    _rows("gather_tokens", flat, index, whole=False)
    # Copies are made in x's own type. Integers and a few numbers a row are torch's: the call would cost more than the work.
    native = flat.is_floating_point() and use_native(flat, prefer_torch=flat.shape[2] < 8, cuda=always)
    rows = native_gather(flat, index, None) if native else gather_reference(flat, index)
    return rows.reshape(x.shape[0], index.shape[1], *x.shape[2:])


def scatter_tokens(x: Tensor, index: Tensor, length: int) -> Tensor:
    """The adjoint of `gather_tokens`: rows of x [B, K, C] are added into zeros [B, length, C] at index [B, K].

    An index of -1 drops the row. Distinct indices put kept rows back where they were. Differentiable in x.
    """
    _rows("scatter_tokens", x, index)
    if use_native(x, cuda=always):
        return native_scatter(x.float(), index, None, length).to(x.dtype)
    return scatter_reference(x, index, None, length)


def _rows(name: str, x: Tensor, index: Tensor, whole: bool = True) -> None:
    if x.ndim != 3 or index.ndim != 2 or index.shape[0] != x.shape[0] or (whole and index.shape[1] != x.shape[1]):
        raise ValueError(f"{name}: rows {tuple(x.shape)} and indices {tuple(index.shape)} do not fit; expected x [B, N, C] "
                         f"and {'[B, N]' if whole else '[B, K]'}")
    one_device(name, x, index)
    if index.dtype != torch.int64:
        raise ValueError(f"{name}: indices must be int64, got {index.dtype}")
