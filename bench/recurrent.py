"""Cases of the recurrent mixers: linear attention with decay beside the masked product over all pairs and beside causal
softmax attention, the selective scan beside a plain loop. H 8 heads of width 64, one row; 512 channels of 16 states."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.bench.case import Arm, Case, Work, with_backend

QUADRATIC = "torch (q k^T * decay) v over all pairs"
SOFTMAX = "torch scaled_dot_product_attention, causal (another function, the crossover)"
LOOP = "torch, one position after the other"


def _arms(ours: Work, peer: Work) -> dict[Arm, Work]:
    return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}


def linear_decay(length: int, peer_kind: str, backward: bool) -> Callable[[], dict[Arm, Work]]:
    """q, k, v [1, 8, N, 64] as a projection leaves them, slopes of ALiBi."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        q, k, v, upstream = (torch.randn(1, length, 8, 64, generator=generator).transpose(1, 2) for _ in range(4))
        leaves = [t.requires_grad_(backward) for t in (q, k, v)]
        log_decay = -(2.0 ** -torch.arange(1.0, 9.0))

        def done(out: Tensor) -> object:
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        def ours() -> object:
            return done(ops.linear_decay(q, k, v, log_decay)[0])

        def quadratic() -> object:
            lag = torch.arange(length)[:, None] - torch.arange(length)[None]
            fade = torch.where(lag >= 0, torch.exp(log_decay[:, None, None] * lag.clamp(min=0)), 0.0)
            return done((q @ k.mT * fade) @ v)

        def softmax() -> object:
            return done(F.scaled_dot_product_attention(q, k, v, is_causal=True))

        return _arms(ours, quadratic if peer_kind == "quadratic" else softmax)

    return build


def ssm_scan(length: int, backward: bool) -> Callable[[], dict[Arm, Work]]:
    """x [1, N, 512], 16 states."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        x, delta = (torch.randn(1, length, 512, generator=generator) for _ in range(2))
        b, c = (torch.randn(1, length, 16, generator=generator) for _ in range(2))
        rate, skip = -torch.arange(1.0, 17.0).repeat(512, 1), torch.ones(512)
        leaves = [t.requires_grad_(backward) for t in (x, delta, rate, b, c, skip)]

        def work() -> object:
            out = ops.ssm_scan(x, delta, rate, b, c, skip)[0]
            return torch.autograd.grad(out, leaves, torch.ones_like(out)) if backward else out

        return _arms(work, with_backend("torch", work))

    return build


RECURRENT_CASES: tuple[Case, ...] = (
    *(
        Case(f"linear-decay/quadratic/{n}/{'forward+backward' if backward else 'forward'}", QUADRATIC,
             linear_decay(n, "quadratic", backward), 5.0 if n == 4096 else None, peer_bytes=4 * 8 * 4 * n * n)
        for backward in (False, True) for n in (512, 1024, 4096, 16384)
    ),
    *(
        Case(f"linear-decay/softmax/{n}/forward", SOFTMAX, linear_decay(n, "softmax", False))
        for n in (64, 128, 256, 512, 2048, 16384)
    ),
    *(
        Case(f"ssm-scan/{n}/{'forward+backward' if backward else 'forward'}", LOOP, ssm_scan(n, backward))
        for backward in (False, True) for n in (256, 1024, 4096)
    ),
)  # fmt: skip
