"""The `[attention]` axis: kinds of attention a preset may ask for, and the plug-in for transformers models."""

from typing import Annotated

from pydantic import Field

from vlm.attention.block_memory import BlockMemory, BlockMemoryOptions
from vlm.attention.decoding import DecoderAttention, WindowedAttention, WindowedOptions, seen_keys, sees_all
from vlm.attention.exact import ExactAttention, ExactAttentionOptions
from vlm.attention.hierarchical import HierarchicalAttention, HierarchicalOptions
from vlm.attention.linear_decay import LinearDecay, LinearDecayOptions
from vlm.attention.ssm_scan import SelectiveScan, SsmOptions
from vlm.attention.trunk_exact import TrunkAttentionOptions

AttentionOptions = ExactAttentionOptions

MixerOptions = Annotated[LinearDecayOptions | SsmOptions, Field(discriminator="kind")]
"""Recurrent layers that may stand where a language model has attention."""

__all__ = [
    "AttentionOptions",
    "BlockMemory",
    "BlockMemoryOptions",
    "DecoderAttention",
    "ExactAttention",
    "ExactAttentionOptions",
    "HierarchicalAttention",
    "HierarchicalOptions",
    "LinearDecay",
    "LinearDecayOptions",
    "MixerOptions",
    "SelectiveScan",
    "SsmOptions",
    "TrunkAttentionOptions",
    "WindowedAttention",
    "WindowedOptions",
    "seen_keys",
    "sees_all",
]
