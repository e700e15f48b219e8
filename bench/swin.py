"""Windowed attention and Swin V2 blocks beside those of transformers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vlm import ops
from vlm.bench.case import Arm, Case, Work, with_backend

PEER = "transformers Swinv2"
HEADS, WIDTH, WINDOW = 8, 256, 8


def _layers(side: int, shift: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(our block, theirs) for maps of `side` positions, with weights of no meaning."""
    from transformers import Swinv2Config
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    from vlm.models.swin import SwinBlock, SwinOptions

    options = SwinOptions(image_size=4 * side, width=WIDTH, depths=(2,), heads=(HEADS,), window=WINDOW, norm_zero_init=False)
    ours = SwinBlock(options, options.stages[0], shift=shift, drop=0.0)
    config = Swinv2Config(embed_dim=WIDTH, window_size=WINDOW)
    theirs = Swinv2Layer(config, WIDTH, (side, side), HEADS, shift_size=shift)
    return ours.eval(), theirs.eval()


def block(windows: int, shift: int) -> Callable[[], dict[Arm, Work]]:
    """One block on maps of 32 x 32 positions, [windows / 16, 32, 32, 256], forward and all gradients."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(windows)
        ours, theirs = _layers(32, shift)
        x = torch.randn(windows // 16, 32, 32, WIDTH, generator=generator).requires_grad_()
        upstream = torch.randn(x.shape, generator=generator)

        def own() -> object:
            return torch.autograd.grad(ours(x), [x, *ours.parameters()], upstream)

        def peer() -> object:
            y = theirs(x.flatten(1, 2), (32, 32))[0]
            return torch.autograd.grad(y, [x, *theirs.parameters()], upstream.flatten(1, 2))

        return {"native": with_backend("native", own), "dispatched": own, "peer": peer}

    return build


def attention(windows: int, shift: int) -> Callable[[], dict[Arm, Work]]:
    """The operator beside what transformers does between its projections: roll, partition, cosine scores, bias, region
    mask, softmax, values, and back. Forward and gradients of q, k, v, the scale and the bias table."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(windows)
        _, theirs = _layers(32, shift)
        inner = getattr(theirs.attention, "self")  # noqa: B009
        for name in ("query", "key", "value"):
            setattr(inner, name, torch.nn.Identity())
        qkv = torch.randn(windows // 16, 32, 32, 3 * WIDTH, generator=generator).requires_grad_()
        upstream = torch.randn(*qkv.shape[:3], WIDTH, generator=generator)
        tau = torch.full((HEADS,), 10.0, requires_grad=True)
        table = torch.randn((2 * WINDOW - 1) ** 2, HEADS, generator=generator).requires_grad_()

        def own() -> object:
            out = ops.window_attention(qkv, tau, table, window=WINDOW, shift=shift)
            return torch.autograd.grad(out, [qkv, tau, table], upstream)

        def peer() -> object:
            out = _as_transformers(theirs, qkv, shift)
            return torch.autograd.grad(out, [qkv, inner.logit_scale, *inner.continuous_position_bias_mlp.parameters()], upstream)

        return {"native": with_backend("native", own), "dispatched": own, "peer": peer}

    return build


def _as_transformers(layer: torch.nn.Module, qkv: Tensor, shift: int) -> Tensor:
    """[B, H, W, 3 C] -> [B, H, W, C] by the functions of its layer; projections are the identity on q, k and v."""
    from transformers.models.swinv2.modeling_swinv2 import window_partition, window_reverse

    inner = getattr(layer.attention, "self")  # noqa: B009
    _, height, width, channels = qkv.shape
    x = torch.roll(qkv, (-shift, -shift), (1, 2)) if shift else qkv
    x = window_partition(x, WINDOW).view(-1, WINDOW**2, channels)
    q, k, v = x.chunk(3, dim=-1)
    inner.query, inner.key, inner.value = _Given(q), _Given(k), _Given(v)
    mask = layer.get_attn_mask(height, width, dtype=x.dtype)  # type: ignore[operator]
    out = inner(q, mask)[0]
    out = window_reverse(out.view(-1, WINDOW, WINDOW, channels // 3), WINDOW, height, width)
    return torch.roll(out, (shift, shift), (1, 2)) if shift else out


class _Given(torch.nn.Module):
    """Stands for a projection whose result is known."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


SWIN_CASES: tuple[Case, ...] = (
    *(
        Case(f"swin/{name}/{windows}/{'shifted' if shift else 'plain'}/forward+backward", PEER, make(windows, shift), target)
        for name, make, target in (("attention", attention, None), ("block", block, 1.3))
        for windows in (128, 1024)
        for shift in (0, WINDOW // 2)
    ),
)
