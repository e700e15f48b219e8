"""Linear attention with exponential decay over the native core, with its plain-torch twin.

B batch, H heads, N positions, D query/key width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import under_autocast, use_native
from vlm.ops.linear_decay_native import cuda_decays, native_linear_decay
from vlm.ops.linear_decay_reference import linear_decay_reference, runs_of

CHUNK = 64
"""Positions of a chunk, by measurement: from 32 to 128 the time is flat within a tenth at widths 64 and 128."""
FEW = 4
"""Up to so many positions take the recurrence itself instead of a chunk."""


def linear_decay(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """out_i = sum over j <= i of exp(log_decay)^(i - j) <q_i, k_j> v_j, in linear time; neither scaled nor normalised.

    q, k [B, H, N, D], v [B, H, N, E], log_decay [H] with every entry <= 0 -> (out [B, H, N, E], last state [B, H, D, E]),
    the state in float32 (float64 for float64 input). Differentiable once in q, k, v, log_decay and state, through both
    results.

    state: [B, H, D, E], where an earlier call ended; zeros by default.
    key_mask: bool [B, N], false where a position does not exist: its output is 0, it neither decays nor changes the state,
        and it may hold anything, NaN included. So padding may stand anywhere.
    segment: integer [B, N], packed documents: the state starts at 0 with each. The state given belongs to the first, the
        state returned to the last. What one holds may reach others only as NaN or infinity, within a chunk.
    chunk: positions computed at once, 1 to 256; 1 is the recurrence itself. The result does not depend on it but for rounding.

    Half-precision input is computed in float32 by the native core and returned in its own type.
    Raises ValueError on shapes, types or decays that do not fit. Source: transnormer.
    """
    q, k, v = under_autocast(q, k, v)
    _check(q, k, v, log_decay, state, key_mask, segment, chunk)
    run = None if segment is None else runs_of(segment, key_mask)
    wide = torch.promote_types(q.dtype, torch.float32)
    log_decay = log_decay.to(wide)
    state = None if state is None else state.to(wide)
    if chunk is None:
        chunk = 1 if not torch.compiler.is_exporting() and q.shape[2] <= FEW else CHUNK
    if not use_native(q, k, v, log_decay, state, cuda=lambda: cuda_decays(q, v, key_mask, run)):
        with torch.autocast(q.device.type, enabled=False):
            return linear_decay_reference(q, k, v, log_decay, state=state, key_mask=key_mask, run=run, chunk=chunk)
    out, last, _ = native_linear_decay(q.float(), k.float(), v.float(), log_decay, state, key_mask, run, chunk, 0)
    return out.to(q.dtype), last


def _check(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, key_mask: Tensor | None,
           segment: Tensor | None, chunk: int | None) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"linear_decay wants q, k [B, H, N, D] and v [B, H, N, E], got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"linear_decay: q, k, v must share one floating type, got {q.dtype}, {k.dtype}, {v.dtype}")
    if log_decay.shape != (q.shape[1],) or not log_decay.is_floating_point():
        raise ValueError(f"linear_decay: log_decay must be floating [{q.shape[1]}], got {log_decay.dtype} {tuple(log_decay.shape)}")
    expected = (q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    if state is not None and (state.shape != expected or not state.is_floating_point()):
        raise ValueError(f"linear_decay: state must be floating {expected}, got {state.dtype} {tuple(state.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (q.shape[0], q.shape[2])):
        raise ValueError(f"linear_decay: key_mask must be bool [{q.shape[0]}, {q.shape[2]}], "
                         f"got {key_mask.dtype} {tuple(key_mask.shape)}")
    if segment is not None and (segment.is_floating_point() or segment.shape != (q.shape[0], q.shape[2])):
        raise ValueError(f"linear_decay: segment must be integer [{q.shape[0]}, {q.shape[2]}], "
                         f"got {segment.dtype} {tuple(segment.shape)}")
    if chunk is not None and not 1 <= chunk <= 256:
        raise ValueError(f"linear_decay: chunk must be 1 to 256, got {chunk}")
