"""The selective state-space scan in plain torch operators: the twin of the native kernel.

B batch, N positions, C channels, S states of a channel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssm_scan_reference(
    x: Tensor,
    delta: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    *,
    state: Tensor | None = None,
    key_mask: Tensor | None = None,
    run: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as `vlm.ops.ssm_scan` (arguments already checked, of one type), in any type and on any device.

    run: int32 [B, N], see `runs_of`. One position after the other; traced for export, where a length may not be asked for,
    all pairs of positions at once, in memory of [B, N, N, C, S]: meant for short pieces and for steps.
    """
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    exists = None if key_mask is None else key_mask[..., None]
    if exists is not None:  # what does not exist may hold NaN
        x, delta, b, c = (torch.where(exists, t, zero) for t in (x, delta, b, c))
    step = F.softplus(delta, threshold=40.0)
    if exists is not None:  # a step of 0 leaves the state as it is
        step = torch.where(exists, step, zero)
    if state is None:
        state = x.new_zeros(x.shape[0], *rate.shape)
    if torch.compiler.is_exporting():
        return _pairs(x, step, rate, b, c, skip, state, run)
    outs = []
    for t in range(x.shape[1]):
        if run is not None and t > 0:
            begins = run[:, t] != run[:, t - 1]
            state = torch.where(begins[:, None, None], zero, state)
        now = step[:, t, :, None]
        state = torch.exp(now * rate) * state + now * x[:, t, :, None] * b[:, t, None]
        outs.append((state * c[:, t, None]).sum(-1))
    out = torch.stack(outs, 1) if outs else x * step
    return out + skip * x, state


def _pairs(x: Tensor, step: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor,
           run: Tensor | None) -> tuple[Tensor, Tensor]:
    """The quadratic form: position t reads every s <= t through exp(rate * (steps after s, up to t))."""
    total = step.cumsum(1)
    place = torch.arange(x.shape[1], device=x.device)
    sees = (place[None, :] <= place[:, None])[None]
    first = torch.ones_like(step[..., :1], dtype=torch.bool)
    if run is not None:
        sees = sees & (run[:, :, None] == run[:, None, :])
        first = (run == run[:, :1])[..., None]
    sees = sees[..., None]
    lag = torch.where(sees, total[:, :, None] - total[:, None], torch.zeros_like(total[:, :, None]))  # [B, N, N, C]
    fade = torch.where(sees[..., None], torch.exp(lag[..., None] * rate), torch.zeros((), dtype=x.dtype, device=x.device))
    enters = (step * x)[..., None] * b[:, :, None]
    states = (fade * enters[:, None]).sum(2)
    arrives = torch.exp(total[..., None] * rate) * state[:, None]
    states = states + torch.where(first[..., None], arrives, torch.zeros_like(arrives))
    return (states * c[:, :, None]).sum(-1) + skip * x, states[:, -1]
