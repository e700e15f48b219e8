"""Alignment of sequences in plain torch, anti-diagonal by anti-diagonal: the twin of the native kernel.

B pairs, N rows, M columns. Made of exportable operators for a fixed N and M.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sequence_alignment_reference(
    cost: Tensor, row_lengths: Tensor | None = None, column_lengths: Tensor | None = None, *, gamma: float = 1.0
) -> Tensor:
    """Same contract as `vlm.ops.sequence_alignment`: cost [B, N, M] -> [B]."""
    batch, rows, columns = cost.shape
    n, m = (
        torch.full((batch,), most, dtype=torch.int64, device=cost.device) if given is None else given.long()
        for given, most in ((row_lengths, rows), (column_lengths, columns))
    )
    impossible = cost.new_full((batch,), math.inf)
    if rows == 0 or columns == 0:
        nothing = cost.sum((1, 2))  # 0, and still of the graph: its gradient has no entries
        return torch.where((n == 0) & (m == 0), nothing, impossible + nothing)
    i, j = torch.arange(rows, device=cost.device), torch.arange(columns, device=cost.device)
    inside = (i[:, None] < n[:, None, None]) & (j < m[:, None, None])
    cost = torch.where(inside, cost, torch.zeros_like(cost))
    end, border = math.inf, cost.new_full((batch, 1), math.inf)
    before = previous = cost.new_full((batch, rows), end)
    diagonals = []
    for d in range(rows + columns - 1):
        column = d - i
        here = (column >= 0) & (column < columns)
        own = cost[:, i, column.clamp(0, columns - 1)]
        corner = torch.cat([border if d else torch.zeros_like(border), before[:, :-1]], dim=1)
        up = torch.cat([border, previous[:, :-1]], dim=1)
        current = own + _softmin(corner, up, previous, gamma, here)
        before, previous = previous, torch.where(here, current, torch.full_like(current, end))
        diagonals.append(previous)
    table = torch.stack(diagonals, dim=1)
    both = (n > 0) & (m > 0)
    row, at = (n - 1).clamp(min=0), (n + m - 2).clamp(min=0)
    values = table[torch.arange(batch, device=cost.device), at, row]
    empty = torch.where((n == 0) & (m == 0), torch.zeros_like(impossible), impossible)
    return torch.where(both, values, empty)


def _softmin(corner: Tensor, up: Tensor, left: Tensor, gamma: float, here: Tensor) -> Tensor:
    """Of the three ways into each cell; inf, without a gradient, where there is none."""
    low = torch.minimum(torch.minimum(corner, up), left).detach()
    closed = (low == math.inf) | ~here
    corner, up, left = (torch.where(closed, torch.zeros_like(x), x) for x in (corner, up, left))
    if gamma == 0:
        first, second = corner == low, up == low
        out = torch.where(first, corner, torch.where(second, up, left))
    else:
        out = -gamma * torch.logsumexp(torch.stack([corner, up, left]) / -gamma, dim=0)
    return torch.where(closed, torch.full_like(out, math.inf), out)
