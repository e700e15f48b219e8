"""Attention over keys found by hierarchical search, without training: `kind = "hierarchical"`. Source: hip."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.config.options import Options


class HierarchicalOptions(Options):
    """Every block of queries sees the first keys, those just before it, and a budget of those between."""

    kind: Literal["hierarchical"] = "hierarchical"
    when: Literal["always", "inference"] = Field("inference", description="in a decoder; inference: a training step sees every key")
    k: int = Field(512, ge=0, description="keys chosen for a block of queries")
    block_q: int = Field(32, ge=1, le=256, description="queries that share a choice")
    block_k: int = Field(2, ge=1, le=256, description="keys that are chosen together")
    window: int = Field(128, ge=0, description="keys before the queries that are always kept")
    sinks: int = Field(16, ge=0, description="first keys that are always kept")
    row_step: int = Field(2, ge=1, description="one query of so many takes part in the search")
    representative: Literal["first", "center"] = Field("center", description="the block by which an interval is judged")
    scale: float | None = Field(None, gt=0, description="factor on the logits; 1/sqrt(head width) when none")

    def build(self) -> HierarchicalAttention:
        return HierarchicalAttention(self)


class HierarchicalAttention(nn.Module):
    """Causal softmax attention over chosen keys, see `vlm.ops.selection`. Holds no parameters."""

    def __init__(self, options: HierarchicalOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """q [B, H, N, D], k [B, G, M, D] (rotated already), v [B, G, M, V] -> [B, H, N, V]; the queries are the last N places.

        bias: broadcastable to [B, H, N, M], -inf where a key may not be seen; the search does not know of it. Gradients
        flow through the attention, the choice is a constant.
        """
        own = self.options
        blocks, _ = ops.select_hierarchical(q, k, budget=own.k, block_q=own.block_q, block_k=own.block_k, window=own.window,
                                            sinks=own.sinks, row_step=own.row_step, representative=own.representative)
        return ops.block_sparse_attention(q, k, v, blocks, scale=own.scale, bias=bias)
