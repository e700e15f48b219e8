"""Linear attention with decay in plain torch operators: the twin of the native kernel and the path that export traces.

B batch, H heads, N positions, D query/key width, E value width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def runs_of(segment: Tensor, key_mask: Tensor | None) -> Tensor:
    """int32 [B, N]: packed documents [B, N] numbered from 0 where they begin; a position that does not exist has the
    number of the one before it."""
    if segment.shape[1] == 0:
        return segment.to(torch.int32)
    if key_mask is None:
        begins = segment[:, 1:] != segment[:, :-1]
    else:
        place = torch.arange(segment.shape[1], device=segment.device)
        last = torch.where(key_mask, place, -1).cummax(1).values  # the last position that exists, up to each
        before = segment.gather(1, last.clamp(min=0))
        begins = key_mask[:, 1:] & (last[:, :-1] >= 0) & (segment[:, 1:] != before[:, :-1])
    return torch.nn.functional.pad(begins.to(torch.int32).cumsum(1, dtype=torch.int32), (1, 0))


def linear_decay_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    key_mask: Tensor | None = None,
    run: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.linear_decay` (arguments already checked), in any type and on any device.

    run: int32 [B, N] as `runs_of` makes it. Traced for export it is one masked product over all pairs, otherwise chunks.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out_type = q.dtype
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if key_mask is not None:  # what does not exist may hold NaN: 0 * NaN must not reach a sum
        exists = key_mask[:, None, :, None]
        q, k, v = (torch.where(exists, t, torch.zeros((), dtype=wide, device=t.device)) for t in (q, k, v))
    if state is None:
        state = q.new_zeros(q.shape[0], q.shape[1], q.shape[3], v.shape[3])
    if torch.compiler.is_exporting() or q.shape[2] <= chunk:
        out, state = _piece(q, k, v, log_decay, state, key_mask, run, run)
        return out.to(out_type), state
    outs = []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        mask = None if key_mask is None else key_mask[:, part]
        follows = None if run is None else run[:, start : start + chunk + 1]
        own = None if run is None else run[:, part]
        out, state = _piece(q[:, :, part], k[:, :, part], v[:, :, part], log_decay, state, mask, own, follows)
        outs.append(out)
    return torch.cat(outs, 2).to(out_type), state


def _piece(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, key_mask: Tensor | None, run: Tensor | None,
           follows: Tensor | None) -> tuple[Tensor, Tensor]:
    """One piece as the masked product over its pairs. The state given is of the run of its first position, the state
    returned of the run of the last of `follows` (the piece, and the position after it if there is one)."""
    length = q.shape[2]
    exists = torch.ones_like(q[:, 0, :, 0], dtype=torch.bool) if key_mask is None else key_mask
    count = exists.to(torch.int64).cumsum(1)  # [B, n]: exponent of the state that came in
    later, earlier = count[:, None, :, None], count[:, None, None, :]
    place = torch.arange(length, device=q.device)
    sees = (place[None, :] <= place[:, None])[None] & exists[:, None, :] & exists[:, :, None]
    enters = leaves = exists
    whole = exists.to(torch.int64).sum(1)
    passes = torch.ones_like(whole, dtype=torch.bool)
    if run is not None and follows is not None and length > 0:
        sees = sees & (run[:, None, :] == run[:, :, None])
        enters = exists & (run == run[:, :1])
        leaves = exists & (run == follows[:, -1:])
        passes = follows[:, 0] == follows[:, -1]
    rate = log_decay[None, :, None, None]
    lag = (later - earlier).clamp(min=0).to(rate.dtype)
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    fade = torch.where(sees[:, None], torch.exp(rate * lag), zero)
    out = (q @ k.transpose(-1, -2) * fade) @ v
    arriving = torch.where(enters[:, None, :, None], torch.exp(rate * later.to(rate.dtype)), zero)
    if run is not None:  # the state is not of all positions: where it is not, NaN in it must not meet q, nor its gradient
        into = enters[:, None, :, None]
        out = out + arriving * torch.where(into, torch.where(into, q, zero) @ state, zero)
    else:
        out = out + arriving * (q @ state)
    left = (whole[:, None, None, None] - count[:, None, :, None]).to(rate.dtype)
    leaving = torch.where(leaves[:, None, :, None], torch.exp(rate * left), zero)
    stays = passes[:, None, None, None]
    kept = torch.where(stays, torch.exp(rate * whole[:, None, None, None].to(rate.dtype)) * torch.where(stays, state, zero), zero)
    return out, kept + (leaving * k).transpose(-1, -2) @ v
