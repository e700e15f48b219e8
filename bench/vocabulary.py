"""Losses over the vocabulary beside torch on all logits: forward and gradients of hidden states and table, mean over the rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from vlm import ops
from vlm.bench.case import Arm, Case, Work, with_backend

ROWS, WIDTH = 4096, 512


def cross_entropy(ids: int, rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Callable[[], dict[Arm, Work]]:
    """hidden [rows, 512], weight [ids, 512], mean loss."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(ids)
        hidden = torch.randn(rows, WIDTH, generator=generator).to(dtype).requires_grad_()
        weight = (torch.randn(ids, WIDTH, generator=generator) * 0.05).to(dtype).requires_grad_()
        labels = torch.randint(0, ids, (rows,), generator=generator)

        def ours() -> object:
            return torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels, reduction="mean").loss, [hidden, weight])

        def peer() -> object:
            return torch.autograd.grad(F.cross_entropy((hidden @ weight.T).float(), labels), [hidden, weight])

        return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}

    return build


def distillation(ids: int, rows: int) -> Callable[[], dict[Arm, Work]]:
    """KL(teacher || student) of two tables [ids, 512]."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(ids)
        hidden, other = (torch.randn(rows, WIDTH, generator=generator) for _ in range(2))
        weight, taught = (torch.randn(ids, WIDTH, generator=generator) * 0.05 for _ in range(2))
        leaves = [hidden.requires_grad_(), weight.requires_grad_()]

        def ours() -> object:
            return torch.autograd.grad(ops.linear_distillation(hidden, weight, other, taught, reduction="mean"), leaves)

        def peer() -> object:
            with torch.no_grad():
                target = (other @ taught.T).log_softmax(-1)
            loss = F.kl_div((hidden @ weight.T).log_softmax(-1), target, reduction="batchmean", log_target=True)
            return torch.autograd.grad(loss, leaves)

        return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}

    return build


PEER = "torch: logits, then cross_entropy"

VOCABULARY_CASES: tuple[Case, ...] = (
    Case("vocabulary/cross-entropy/32k/forward+backward", PEER, cross_entropy(32768), 1.2, peer_bytes=3 * 4 * ROWS * 32768),
    Case("vocabulary/cross-entropy/128k/forward+backward", PEER, cross_entropy(131072), 1.2, peer_bytes=3 * 4 * ROWS * 131072),
    Case("vocabulary/cross-entropy/bfloat16/32k/forward+backward", PEER, cross_entropy(32768, dtype=torch.bfloat16)),
    Case("vocabulary/cross-entropy/4k/forward+backward", PEER, cross_entropy(4096)),
    Case("vocabulary/distillation/32k/forward+backward", "torch: logits of both, then kl_div", distillation(32768, 2048)),
)
