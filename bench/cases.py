"""The measured cases, listed one by one: our operator beside the named peer, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.bench.case import PEER_MEMORY_LIMIT, Arm, Case, Work, with_backend
from vlm.bench.decoder import DECODER_CASES
from vlm.bench.swin import SWIN_CASES


def _arms(ours: Work, peer: Work) -> dict[Arm, Work]:
    return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}


def _attention(mask: str, length: int, backward: bool) -> Callable[[], dict[Arm, Work]]:
    """q, k, v [B, 8, N, 64] as a projection leaves them ([B, N, H, D] in memory); half the keys padded on average."""
    batch = 2 if length >= 4096 else 8

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(batch, length, 8, 64, generator=generator).transpose(1, 2) for _ in range(3))
        upstream = torch.randn(batch, length, 8, 64, generator=generator).transpose(1, 2)
        lengths = torch.linspace(length // 8, length * 7 // 8, batch).long() if mask == "padding" else None
        allow = None if lengths is None else (torch.arange(length) < lengths[:, None])[:, None, None, :]
        leaves = [t.requires_grad_(backward) for t in (q, k, v)]

        def ours() -> object:
            out = ops.attention(q, k, v, causal=mask == "causal", key_mask=lengths)
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        def peer() -> object:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allow, is_causal=mask == "causal")
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        return _arms(ours, peer)

    return build


def contrastive(form: str, batch: int, width: int = 512) -> Callable[[], dict[Arm, Work]]:
    """x, y [B, E] unit rows; loss and gradients of x, y, the scale, and the bias of form "sigmoid"."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(batch)
        x, y = (F.normalize(torch.randn(batch, width, generator=generator), dim=1).requires_grad_() for _ in range(2))
        softmax = form == "softmax"
        log_scale = torch.tensor(2.659 if softmax else 2.303, requires_grad=True)
        bias = torch.tensor(-10.0, requires_grad=not softmax)
        leaves: list[Tensor] = [x, y, log_scale, *([] if softmax else [bias])]

        def ours() -> object:
            if softmax:
                rows, columns = ops.contrastive_softmax(x, y, log_scale)
                loss = (rows.mean() + columns.mean()) / 2
            else:
                loss = ops.contrastive_sigmoid(x, y, log_scale, bias)[0].mean()
            return torch.autograd.grad(loss, leaves)

        def peer() -> object:
            """As open_clip writes them: all logits, then cross_entropy twice, or logsigmoid of signed logits."""
            logits = log_scale.exp() * x @ y.T
            if softmax:
                labels = torch.arange(batch)
                loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            else:
                labels = 2 * torch.eye(batch) - torch.ones(batch)
                loss = -F.logsigmoid(labels * (logits + bias)).sum() / batch
            return torch.autograd.grad(loss, leaves)

        return _arms(ours, peer)

    return build


SDPA = "torch scaled_dot_product_attention"
DENSE = "torch loss on all logits"

_ATTENTION_TARGETS = {("dense", 256): 0.95, ("dense", 1024): 1.0, ("dense", 4096): 1.0, ("causal", 4096): 1.3}
_CONTRASTIVE_TARGETS = {8192: 2.0, 16384: 2.5}

CASES: tuple[Case, ...] = (
    *(
        Case(
            f"attention/{mask}/{length}/{'forward+backward' if backward else 'forward'}",
            SDPA,
            _attention(mask, length, backward),
            None if backward else _ATTENTION_TARGETS.get((mask, length)),
        )
        for backward in (False, True)
        for mask in ("dense", "causal", "padding")
        for length in (256, 1024, 4096)
    ),
    *(
        Case(
            f"contrastive/{form}/{batch}/forward+backward",
            DENSE,
            contrastive(form, batch),
            _CONTRASTIVE_TARGETS.get(batch),
            peer_bytes=4 * 4 * batch * batch,  # about four matrices of logits live at once
        )
        for form in ("softmax", "sigmoid")
        for batch in (1024, 4096, 8192, 16384, 32768)
    ),
    *DECODER_CASES,
    *SWIN_CASES,
)

__all__ = ["CASES", "DENSE", "PEER_MEMORY_LIMIT", "SDPA", "Arm", "Case", "Work", "contrastive"]
