"""The `[model.attention]` table of a language model: what its decoder's queries see of what was read. No kind has weights.

Source: hip, infllm, lm-infinite.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag
from torch import Tensor, nn

from vlm import ops
from vlm.attention.block_memory import BlockMemoryOptions
from vlm.attention.hierarchical import HierarchicalOptions
from vlm.attention.trunk_exact import TrunkAttentionOptions
from vlm.config.options import Options
from vlm.ops import masks

When = Literal["always", "inference"]


class WindowedOptions(Options):
    """Every key before the query, or a window of them and the first ones, for a model that learned to see all of them."""

    kind: Literal["windowed"] = "windowed"
    when: When = Field("inference", description="inference: a training step sees every key")
    window: int | None = Field(None, gt=0, description="keys up to the query, itself included, that it sees; none: all")
    sinks: int = Field(0, ge=0, description="first keys that are always seen, beside a window")

    def build(self) -> WindowedAttention:
        return WindowedAttention(self)


class WindowedAttention(nn.Module):
    """Causal softmax attention, under a window if there is one. Holds no parameters."""

    def __init__(self, options: WindowedOptions) -> None:
        super().__init__()
        self.mask = None if options.window is None else masks.Lambda(options.window, options.sinks)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] -> [B, H, N, V]; the queries are the last N places."""
        return ops.attention(q, k, v, causal=True, mask=self.mask)


AnyDecoderAttention = TrunkAttentionOptions | WindowedOptions | HierarchicalOptions | BlockMemoryOptions


def _kind(value: Any) -> str:
    """A table without a kind is exact attention, which every model has."""
    return str(value.get("kind", "exact") if isinstance(value, dict) else getattr(value, "kind", "exact"))


DecoderAttention = Annotated[
    Annotated[TrunkAttentionOptions, Tag("exact")]
    | Annotated[WindowedOptions, Tag("windowed")]
    | Annotated[HierarchicalOptions, Tag("hierarchical")]
    | Annotated[BlockMemoryOptions, Tag("block-memory")],
    Discriminator(_kind),
]
"""Kinds of attention that a decoder may be given when it reads and writes."""


def sees_all(options: AnyDecoderAttention | None) -> bool:
    """Whether queries see every key before them, however long the row."""
    if isinstance(options, TrunkAttentionOptions):
        return options.plain
    return options is None or (isinstance(options, WindowedOptions) and options.window is None)


def seen_keys(options: AnyDecoderAttention | None, keys: int) -> int:
    """Of `keys` keys up to a query, those that it attends at most; searching for them is not counted."""
    if isinstance(options, HierarchicalOptions):
        # Windows and choices are whole blocks, for a whole block of queries; what was written since a choice is seen too.
        near = options.window + options.block_q + options.refresh - 1
        return min(keys, options.k + options.sinks + near + 2 * options.block_k)
    if isinstance(options, BlockMemoryOptions):
        # What left the window and forms no block yet is seen too.
        return min(keys, options.n_init + options.n_local + options.topk * options.block + options.block + options.chunk)
    if isinstance(options, TrunkAttentionOptions):
        return keys if options.reach is None else min(keys, options.reach + options.sinks)
    if options is not None and options.window is not None:
        return min(keys, options.window + options.sinks)
    return keys


__all__ = ["DecoderAttention", "WindowedAttention", "WindowedOptions", "seen_keys", "sees_all"]
