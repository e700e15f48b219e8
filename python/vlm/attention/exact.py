"""Exact attention as a part: `[attention] kind = "exact"`. Source: core-exact-attention."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.config.options import Options


class ExactAttentionOptions(Options):
    """Softmax attention over every allowed key."""

    kind: Literal["exact"] = "exact"
    scale: float | None = Field(None, gt=0, description="factor on the logits; 1/sqrt(head width) when none")
    alignment: ops.Alignment = Field(
        "bottom-right",
        description="where causal masks end when there are more keys than queries: with the last key "
        "(bottom-right, for caches) or on the main diagonal (top-left)",
    )

    def build(self) -> ExactAttention:
        return ExactAttention(self)


class ExactAttention(nn.Module):
    """softmax(scale * q k^T + bias) v, see `vlm.ops.attention`. Holds no parameters."""

    def __init__(self, options: ExactAttentionOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
                bias: Tensor | None = None) -> Tensor:
        """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] -> [B, H, N, V]."""
        return ops.attention(q, k, v, causal=causal, alignment=self.options.alignment, key_mask=key_mask, bias=bias,
                             scale=self.options.scale)
