"""Cases of masked and biased attention: `vlm.ops.attention` under a mask program beside torch's own under a tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.bench.case import Arm, Case, Work, with_backend
from vlm.ops import masks

SDPA = "torch scaled_dot_product_attention"


def _arms(ours: Work, peer: Work) -> dict[Arm, Work]:
    return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}


def _documents(length: int, mean: int) -> Tensor:
    """Ids [1, N] of documents of random lengths, `mean` on average."""
    generator = torch.Generator().manual_seed(mean)
    cuts = torch.randperm(length - 1, generator=generator)[: length // mean - 1] + 1
    ids = torch.zeros(length, dtype=torch.long)
    ids[cuts] = 1
    return ids.cumsum(0)[None]


def masked(kind: str, length: int, backward: bool, dtype: torch.dtype = torch.float32) -> Callable[[], dict[Arm, Work]]:
    """q, k, v [1, 8, N, 64] as a projection leaves them; the peer gets the same mask as booleans."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        q, k, v, upstream = (torch.randn(1, length, 8, 64, generator=generator).to(dtype).transpose(1, 2) for _ in range(4))
        leaves = [t.requires_grad_(backward) for t in (q, k, v)]
        program = {
            "window-256": masks.MaskProgram(masks.Window(256)),
            "lambda-256": masks.MaskProgram(masks.Lambda(256, 16)),
            "documents-256": masks.MaskProgram(masks.Causal(), masks.Segments(_documents(length, 256))),
            "dense": masks.MaskProgram(),
        }[kind]
        allow = program.allow(masks.MaskShape(1, 8, length, length, q.device))

        def ours() -> object:
            out = ops.attention(q, k, v, mask=program if program.atoms else None)
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        def peer() -> object:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=allow)
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        return _arms(ours, peer)

    return build


def swin(backward: bool, shifted: bool = False) -> Callable[[], dict[Arm, Work]]:
    """1024 windows of 8 x 8 tokens, 8 heads of 32: table bias; the peer gets it as a float tensor [1, 8, 64, 64], with the
    regions of shifted windows [1024, 8, 64, 64]."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(8)
        q, k, v, upstream = (torch.randn(1024, 64, 8, 32, generator=generator).transpose(1, 2) for _ in range(4))
        table = torch.randn(15 * 15, 8, generator=generator)
        leaves = [t.requires_grad_(backward) for t in (q, k, v, table)]
        bias = ops.GridBias(table, 8, 8)
        shape = masks.MaskShape(1024, 8, 64, 64, q.device)
        region = torch.zeros(1024, 8, 8, dtype=torch.long)
        region[15::16, :, 4:] += 1  # an image of 16 windows a row: its last column and row hold two regions
        region[960:, 4:] += 2
        mask = masks.MaskProgram(masks.Segments(region.flatten(1))) if shifted else None
        removed = None
        if mask is not None:
            removed = torch.zeros(1024, 1, 64, 64).masked_fill_(~mask.allow(shape), -torch.inf)  # type: ignore[operator]

        def ours() -> object:
            out = ops.attention(q, k, v, bias=bias, mask=mask)
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        def peer() -> object:
            added = bias.dense(shape)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=added if removed is None else added + removed)
            return torch.autograd.grad(out, leaves, upstream) if backward else out

        return _arms(ours, peer)

    return build


def window_beside_flex(length: int, window: int) -> Callable[[], dict[Arm, Work]]:
    """Forward of q, k, v [1, 8, N, 64] under a causal window; the peer is compiled and has its block mask before it is timed
    (without gradients: it has none on the CPU)."""

    def build() -> dict[Arm, Work]:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        generator = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(1, length, 8, 64, generator=generator).transpose(1, 2) for _ in range(3))
        program = masks.MaskProgram(masks.Window(window))
        blocks = create_block_mask(lambda b, h, i, j: (j <= i) & (i - j < window), None, None, length, length, device="cpu")
        flex = torch.compile(flex_attention, fullgraph=True)

        @torch.no_grad()
        def ours() -> object:
            return ops.attention(q, k, v, mask=program)

        @torch.no_grad()
        def peer() -> object:
            return flex(q, k, v, block_mask=blocks)

        torch.testing.assert_close(peer(), ours(), atol=1e-4, rtol=1e-4)
        return _arms(ours, peer)

    return build


def _name(kind: str, length: int, backward: bool) -> str:
    return f"attention/{kind}/{length}/{'forward+backward' if backward else 'forward'}"


ATTENTION_CASES: tuple[Case, ...] = (
    *(Case(_name(kind, length, backward), SDPA, masked(kind, length, backward), target)
      for kind, length, backward, target in [
          ("window-256", 4096, False, 8.0), ("window-256", 4096, True, 6.0),
          ("lambda-256", 4096, False, None), ("lambda-256", 4096, True, None),
          ("documents-256", 4096, False, 8.0), ("documents-256", 4096, True, 8.0)]),
    Case("attention/window-256-flex/4096/forward", "torch flex_attention, compiled", window_beside_flex(4096, 256), 1.5,
         memory="compiling the peer leaves more freed memory behind than either side needs, which hides both"),
    *(Case(f"attention/{'swin-shifted' if shifted else 'swin'}/64/{'forward+backward' if backward else 'forward'}", SDPA,
           swin(backward, shifted), 1.0) for shifted in (False, True) for backward in (False, True)),
    Case("attention/dense-bf16/1024/forward", SDPA, masked("dense", 1024, False, torch.bfloat16), 1.25),
    Case("attention/dense-bf16/1024/forward+backward", SDPA, masked("dense", 1024, True, torch.bfloat16), None),
)
