"""Selective state-space scan (Mamba's) over the native core, with its plain-torch twin.

B batch, N positions, C channels, S states of a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import use_native
from vlm.ops.linear_decay_reference import runs_of
from vlm.ops.ssm_scan_native import native_ssm_scan
from vlm.ops.ssm_scan_reference import ssm_scan_reference


def ssm_scan(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    *,
    state: Tensor | None = None,
    key_mask: Tensor | None = None,
    segment: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """With step = softplus(delta) and h_t = exp(step rate) h_{t-1} + step x_t b_t:  out_t = <h_t, c_t> + skip x_t.

    x, delta [B, N, C], rate [C, S] with every entry <= 0, b, c [B, N, S], skip [C] -> (out [B, N, C], last state
    [B, C, S]), the state in float32 (float64 for float64 input). softplus is inside, so `delta` comes with its bias added.
    Differentiable once in all of them and in `state`, through both results.

    state: [B, C, S], where an earlier call ended; zeros by default.
    key_mask: bool [B, N], false where a position does not exist: its output is 0, the state passes it unchanged, and it may
        hold anything, NaN included.
    segment: integer [B, N], packed documents: the state starts at 0 with each. The state given belongs to the first, the
        state returned to the last.

    Half-precision input is computed in float32 and returned in its own type, autocast or not.
    Raises ValueError on shapes or types that do not fit. Source: tokenunify (the selective layer is Mamba's).
    """
    _check(x, delta, rate, b, c, skip, state, key_mask, segment)
    run = None if segment is None else runs_of(segment, key_mask)
    wide = torch.promote_types(x.dtype, torch.float32)
    given = [t.to(wide) for t in (x, delta, rate, b, c, skip)]
    state = None if state is None else state.to(wide)
    with torch.autocast(x.device.type, enabled=False):
        if use_native(*given, state):
            out, last, _ = native_ssm_scan(*given, state, key_mask, run)
        else:
            out, last = ssm_scan_reference(*given, state=state, key_mask=key_mask, run=run)
    return out.to(x.dtype), last


def _check(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor | None,
           key_mask: Tensor | None, segment: Tensor | None) -> None:
    if x.ndim != 3 or delta.shape != x.shape or not all(t.is_floating_point() for t in (x, delta, rate)):
        raise ValueError(f"ssm_scan wants x and delta [B, N, C] and rate [C, S], floating, got {x.dtype} {tuple(x.shape)}, "
                         f"{delta.dtype} {tuple(delta.shape)} and {rate.dtype}")
    if rate.ndim != 2 or rate.shape[0] != x.shape[2]:
        raise ValueError(f"ssm_scan: rate must be [{x.shape[2]}, S], got {tuple(rate.shape)}")
    expected = {"b": (b, (*x.shape[:2], rate.shape[1])), "c": (c, (*x.shape[:2], rate.shape[1])), "skip": (skip, (x.shape[2],))}
    if state is not None:
        expected["state"] = (state, (x.shape[0], *rate.shape))
    for name, (given, shape) in expected.items():
        if given.shape != shape or not given.is_floating_point():
            raise ValueError(f"ssm_scan: {name} must be floating {tuple(shape)}, got {given.dtype} {tuple(given.shape)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != x.shape[:2]):
        raise ValueError(f"ssm_scan: key_mask must be bool {tuple(x.shape[:2])}, got {key_mask.dtype} {tuple(key_mask.shape)}")
    if segment is not None and (segment.is_floating_point() or segment.shape != x.shape[:2]):
        raise ValueError(f"ssm_scan: segment must be integer {tuple(x.shape[:2])}, got {segment.dtype} {tuple(segment.shape)}")
