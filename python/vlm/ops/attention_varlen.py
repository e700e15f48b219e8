"""Exact attention over sequences of different lengths laid one behind the other, without padding.

T all queries, S all keys, H query heads, G key/value heads, D width, V value width, L sequences.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vlm.ops.attention import attention
from vlm.ops.masks import Rows


@overload
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor | None = ..., *,
                     causal: bool = ..., window: int | None = ..., scale: float | None = ..., softcap: float | None = ...,
                     dropout: tuple[float, int] | None = ..., return_lse: Literal[False] = ...) -> Tensor: ...


@overload
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor | None = ..., *,
                     causal: bool = ..., window: int | None = ..., scale: float | None = ..., softcap: float | None = ...,
                     dropout: tuple[float, int] | None = ..., return_lse: Literal[True]) -> tuple[Tensor, Tensor]: ...


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: tuple[float, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Each sequence attends to itself alone: equal to a loop of `attention` over them, and to a mask of segments.

    q [T, H, D], k [S, G, D], v [S, G, V] -> [T, H, V]; with `return_lse` also [T, H].
    query_starts, key_starts: integer [L + 1], ascending from 0 to T and S: where each sequence starts, and the end
        (`cu_seqlens`). key_starts is query_starts when none. A sequence may be empty.
    causal: within each sequence, its last query sees its last key (bottom-right).
    window: only keys with distance 0 <= d < window, which implies causal.
    Dropout counts queries and keys of the whole pack. Raises ValueError on what does not fit. Source: core-exact-attention.
    """
    key_starts = query_starts if key_starts is None else key_starts
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(f"attention_varlen wants q, k, v of 3 axes [length, heads, width], got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if window is not None and window < 1:
        raise ValueError(f"attention_varlen: window is {window}; expected 1 or more")
    _check_starts(query_starts, q.shape[0], "query_starts")
    _check_starts(key_starts, k.shape[0], "key_starts")
    if query_starts.shape != key_starts.shape:
        raise ValueError(f"attention_varlen: {query_starts.shape[0] - 1} sequences of queries and {key_starts.shape[0] - 1} of keys")
    ranges = _ranges(query_starts.to(q.device), key_starts.to(q.device), q.shape[0], causal or window is not None, window)
    out, lse = attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), mask=Rows(ranges[None]), scale=scale,
                         softcap=softcap, dropout=dropout, return_lse=True)
    out = out[0].transpose(0, 1)
    return (out, lse[0].T) if return_lse else out


def _ranges(query_starts: Tensor, key_starts: Tensor, queries: int, causal: bool, window: int | None) -> Tensor:
    """Keys of each query, [T, 2]."""
    i = torch.arange(queries, device=query_starts.device)
    if torch.compiler.is_exporting():  # ONNX has no search
        sequence = (query_starts[1:] <= i[:, None]).sum(1)
    else:
        sequence = torch.searchsorted(query_starts[1:].contiguous(), i, right=True)
    first, end = key_starts[sequence], key_starts[sequence + 1]
    if not causal:
        return torch.stack([first, end], 1)
    position = i - query_starts[sequence + 1] + end  # of the query among the keys: the last meets the last
    low = first if window is None else torch.maximum(first, position - window + 1)
    high = torch.maximum(torch.minimum(end, position + 1), low)
    return torch.stack([low, high], 1)


def _check_starts(starts: Tensor, length: int, name: str) -> None:
    if starts.ndim != 1 or starts.shape[0] < 1 or starts.is_floating_point() or starts.dtype == torch.bool:
        raise ValueError(f"attention_varlen: {name} must be integer [sequences + 1], got {starts.dtype} {tuple(starts.shape)}")
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or starts.device.type != "cpu":
        return  # the values cannot be looked at
    if starts[0] != 0 or starts[-1] != length or (starts.diff() < 0).any():
        raise ValueError(f"attention_varlen: {name} must ascend from 0 to {length}, got {starts.tolist()[:8]} ...")
