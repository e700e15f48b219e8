"""A few queries over many keys, without projecting the keys.

A logit is <q, W_k y_j> = <W_k^T q, y_j>, and what is read is W_v sum_j p_j y_j + b_v: two vectors of the model's width for each query
and head in place of two projections of every position. n rows, N positions, C width, H heads over G of keys, D head width, g queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm import ops
from vlm.attention.exact import ExactAttention
from vlm.layers import Attention
from vlm.ops import masks


def reads_unprojected(own: Attention, core: ExactAttention, queries: int) -> bool:
    """Whether this is the same function and cheaper: plain projections, logits that are plain products, few queries.

    Keys at rotary positions are no products of one matrix; the caller knows of those.
    """
    o = core.options
    plain = type(own.k) is nn.Linear and type(own.v) is nn.Linear  # an adapter is more than its weight
    dropped = o.dropout > 0 and core.training
    return plain and o.score == "dot" and o.softcap is None and not dropped and not core.program.atoms and 4 * queries <= own.head_width


def read_unprojected(own: Attention, core: ExactAttention, q: Tensor, y: Tensor, allow: Tensor, distance: Tensor) -> Tensor:
    """q [n, H, g, D] of `own` over the positions y [n, N, C] -> what the heads read [n, H, g, D].

    allow: bool [n, g, N]; a query that sees nothing reads the bias of the values. distance: integer [n, g, N] for the bias of `core`.
    """
    n, heads, g, width = q.shape
    groups, total = own.kv_heads, y.shape[2]
    folded = torch.einsum("nkrgd,kdc->nkrgc", q.reshape(n, groups, -1, g, width), own.k.weight.view(groups, width, total))
    if own.k.bias is not None:  # it adds one number to all logits of a query: no effect, and a gradient of 0
        folded = folded + 0.0 * own.k.bias.sum()
    bias = core.bias_at(distance)
    read = ops.attention(
        folded.reshape(n, 1, heads * g, total), y[:, None], y[:, None],
        mask=masks.Dense(allow[:, None].expand(-1, heads, -1, -1).reshape(n, 1, heads * g, -1)),
        bias=None if bias is None else bias.reshape(-1, 1, heads * g, y.shape[1]),
        scale=width**-0.5 if core.options.scale is None else core.options.scale,
    )  # fmt: skip
    seen = torch.einsum("nkrgc,kdc->nkrgd", read.view(n, groups, -1, g, total), own.v.weight.view(groups, width, total))
    if own.v.bias is not None:
        seen = seen + own.v.bias.view(groups, 1, 1, width)
    return seen.reshape(n, heads, g, width)
