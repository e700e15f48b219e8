"""A stack of transformer blocks, shared by every tower and language model.

One block with options instead of one class a paper: norm, feed-forward kind, biases, rotary positions, grouped
keys and values. B rows, N positions, C width, H heads, G key and value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm.layers.attention import Attention
from vlm.layers.feed_forward import FeedForward
from vlm.layers.norms import norm_of
from vlm.layers.options import TrunkOptions
from vlm.layers.rotary import rotary_tables


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.norm1 = norm_of(options.norm, options.width, options.norm_eps)
        self.attention = Attention(options)
        self.norm2 = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=causal, key_mask=key_mask, bias=bias, rotary=rotary)
        return x + self.ffn(self.norm2(x))

    def extend(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal block over x [B, N, C] behind `past` keys and values [B, G, P, D], which are rotated already.

        rotary: of the N new positions; key_mask [B, P + N]. Returns (x, keys, values [B, G, P + N, D]).
        """
        q, k, v = self.project(x, rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.attend(x, q, k, v, key_mask, bias), k, v

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, C] -> queries [B, H, N, D], keys, values [B, G, N, D] of the normalised x, rotated."""
        y = self.norm1(x)
        q = self.attention.queries(y, rotary)
        return q, *self.attention.keys_values(y, rotary)

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The block after `project`: q of x [B, N, C] attends causally k, v [B, G, P + N, D]; key_mask [B, P + N]."""
        x = x + self.attention.attend(q, k, v, causal=True, key_mask=key_mask, bias=bias)
        return x + self.ffn(self.norm2(x))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block after its heads have read `mixed` [B, H, N, D]."""
        x = x + self.attention.merged(mixed)
        return x + self.ffn(self.norm2(x))


class Trunk(nn.Module):
    """A stack of blocks. `recompute` trades time for memory in backward."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.options = options
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.recompute = False
        self._initialise()

    def _initialise(self) -> None:
        """Depth-scaled normal initialisation of the CLIP paper's text tower, for every trunk."""
        width, depth = self.options.width, self.options.depth
        out_std = width**-0.5 * (2 * depth) ** -0.5
        blocks: Any = self.blocks
        for block in blocks:
            for linear in (block.attention.q, block.attention.k, block.attention.v):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=out_std)
            block.ffn.initialise(width, depth)
            for name, parameter in block.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        key_mask: Tensor | None = None,
        segment: Tensor | None = None,
        position: Tensor | None = None,
        collect: Collection[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x [B, N, C] -> (x after the last block, hidden states by layer); only the first `stop` blocks if given.

        key_mask [B, N]; segment [B, N] packed documents, which never see one another; position [B, N] for rotary
        positions (default 0..N-1). Layer 0 is the input, layer l the output of block l.
        """
        rotary = None
        if self.options.rope_theta is not None:
            if position is None:
                position = torch.arange(x.shape[1], device=x.device)[None]
            rotary = self.rotary(position)
        bias = None if segment is None else segment_bias(segment, x.dtype)
        hidden = {0: x} if 0 in collect else {}
        for layer, block in enumerate(self.blocks[:stop], start=1):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, key_mask, bias, rotary, use_reentrant=False)
            else:
                x = block(x, causal, key_mask, bias, rotary)
            if layer in collect:
                hidden[layer] = x
        return x, hidden

    def rotary(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos, sin of positions [B, N] for this trunk's heads; None without rotary positions."""
        if self.options.rope_theta is None:
            return None
        head = self.options.head_width or self.options.width // self.options.heads
        return rotary_tables(position, head, self.options.rope_theta)


def segment_bias(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, N, N] for segment [B, N]: 0 within a document, -inf between two."""
    apart = segment[:, None, :, None] != segment[:, None, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=segment.device).masked_fill_(apart, -torch.inf)
