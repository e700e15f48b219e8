"""The `[attention]` axis: kinds of attention a preset may ask for, and the plug-in for transformers models."""

from vlm.attention.exact import ExactAttention, ExactAttentionOptions

AttentionOptions = ExactAttentionOptions

__all__ = ["AttentionOptions", "ExactAttention", "ExactAttentionOptions"]
