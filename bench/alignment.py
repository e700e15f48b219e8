"""Alignment of sequences beside the same recursion in plain torch, a loop over anti-diagonals of the whole batch."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlm import ops
from vlm.bench.case import Arm, Case, Work, with_backend


def alignment(pairs: int, length: int, gamma: float = 1.0) -> Callable[[], dict[Arm, Work]]:
    """costs [pairs, length, length], values and gradients."""

    def build() -> dict[Arm, Work]:
        cost = torch.rand(pairs, length, length, generator=torch.Generator().manual_seed(length)).requires_grad_()

        def ours() -> object:
            return torch.autograd.grad(ops.sequence_alignment(cost, gamma=gamma).sum(), cost)

        def peer() -> object:
            return torch.autograd.grad(ops.sequence_alignment_reference(cost, gamma=gamma).sum(), cost)

        return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}

    return build


PEER = "torch, a loop over anti-diagonals"

ALIGNMENT_CASES: tuple[Case, ...] = tuple(
    Case(f"alignment/soft-dtw/{pairs}x{length}/forward+backward", PEER, alignment(pairs, length))
    for pairs, length in ((2016, 8), (256, 64), (16, 256))
)
