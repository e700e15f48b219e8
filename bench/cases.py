"""The measured cases, listed one by one: our operator beside the named peer, on the same inputs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from vlm import ops
from vlm.bench.alignment import ALIGNMENT_CASES
from vlm.bench.attention import ATTENTION_CASES
from vlm.bench.bfloat16 import BFLOAT16_CASES
from vlm.bench.case import PEER_MEMORY_LIMIT, Arm, Case, Work, with_backend
from vlm.bench.contrastive import CONTRASTIVE_CASES, DENSE, contrastive
from vlm.bench.decoder import DECODER_CASES
from vlm.bench.longformer import LONGFORMER_CASES
from vlm.bench.recurrent import RECURRENT_CASES
from vlm.bench.selection import SELECTION_CASES
from vlm.bench.steps import STEP_CASES
from vlm.bench.swin import SWIN_CASES
from vlm.bench.tokens import TOKEN_CASES
from vlm.bench.vocabulary import VOCABULARY_CASES


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


SDPA = "torch scaled_dot_product_attention"

_ATTENTION_TARGETS = {("dense", 256, False): 0.95, ("dense", 1024, False): 1.0, ("dense", 4096, False): 1.0,
                      ("dense", 1024, True): 1.0, ("dense", 4096, True): 1.0,
                      ("causal", 4096, False): 1.3, ("causal", 4096, True): 1.2}

CASES: tuple[Case, ...] = (
    *(
        Case(
            f"attention/{mask}/{length}/{'forward+backward' if backward else 'forward'}",
            SDPA,
            _attention(mask, length, backward),
            _ATTENTION_TARGETS.get((mask, length, backward)),
        )
        for backward in (False, True)
        for mask in ("dense", "causal", "padding")
        for length in (256, 1024, 4096)
    ),
    *ATTENTION_CASES,
    *BFLOAT16_CASES,
    *CONTRASTIVE_CASES,
    *DECODER_CASES,
    *LONGFORMER_CASES,
    *TOKEN_CASES,
    *VOCABULARY_CASES,
    *ALIGNMENT_CASES,
    *RECURRENT_CASES,
    *SELECTION_CASES,
    *SWIN_CASES,
    *STEP_CASES,
)

__all__ = ["CASES", "DENSE", "PEER_MEMORY_LIMIT", "SDPA", "Arm", "Case", "Work", "contrastive"]
