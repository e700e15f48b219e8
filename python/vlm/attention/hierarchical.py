"""Attention over keys found by hierarchical search, without training: `kind = "hierarchical"`. Source: hip."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
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
    refresh: int = Field(1, ge=1, description="written tokens that share a choice; 1: each makes its own")
    scale: float | None = Field(None, gt=0, description="factor on the logits; 1/sqrt(head width) when none")

    def build(self) -> HierarchicalAttention:
        return HierarchicalAttention(self)


@dataclass(frozen=True)
class Choice:
    """What a written token chose: index int32 [B, H, K], its blocks ascending. It had `keys` keys before it, itself included;
    steps: tokens that have read by it."""

    index: Tensor
    keys: int
    steps: int

    def row(self, at: int) -> Choice:
        return replace(self, index=self.index[at : at + 1])

    @staticmethod
    def joined(rows: Sequence[Choice | None]) -> Choice | None:
        """The choice of several rows at once; None where they did not choose at the same step among as many keys."""
        known = [row for row in rows if row is not None]
        if len(known) < len(rows) or len({(row.keys, row.steps, row.index.shape[2]) for row in known}) != 1:
            return None
        return known[0] if len(known) == 1 else replace(known[0], index=torch.cat([row.index for row in known]))


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
        return ops.block_sparse_attention(q, k, v, self.choose(q, k), scale=self.options.scale, bias=bias)

    def choose(self, q: Tensor, k: Tensor) -> ops.BlockList:
        """The blocks that every block of queries sees; shapes as in `forward`."""
        own = self.options
        return ops.select_hierarchical(q, k, budget=own.k, block_q=own.block_q, block_k=own.block_k, window=own.window,
                                       sinks=own.sinks, row_step=own.row_step, representative=own.representative)[0]

    def step(self, q: Tensor, k: Tensor, v: Tensor, kept: Choice | None) -> tuple[Tensor, Choice | None]:
        """As `forward` behind a cache: (values [B, H, N, V], the choice that the next token may read by).

        One query reads by `kept` until `refresh` tokens have done so, and then chooses anew. Blocks begun since the choice are
        seen too: what it had in its window does not leave it before the next choice. Several queries are no steps of
        writing: they choose by `forward`, and leave nothing.
        """
        if q.shape[2] != 1:
            return self(q, k, v), None
        own, keys = self.options, k.shape[2]
        if kept is None or kept.steps >= own.refresh:
            blocks = self.choose(q, k)
            listed = int(blocks.count.max()) if len(q) else 0  # the lengths alone say how many: all heads have as many
            kept = Choice(blocks.index[:, :, 0, :listed], keys, 0)
        since = torch.arange(-(-kept.keys // own.block_k), -(-keys // own.block_k), dtype=torch.int32, device=q.device)
        index = torch.cat([kept.index, since.expand(*kept.index.shape[:2], -1)], 2)[:, :, None]
        count = torch.full(index.shape[:3], index.shape[3], dtype=torch.int32, device=q.device)
        blocks = ops.BlockList(index, count, own.block_q, own.block_k)
        return ops.block_sparse_attention(q, k, v, blocks, scale=own.scale), replace(kept, steps=kept.steps + 1)
