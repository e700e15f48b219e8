"""The shape of a stack of blocks, which every layer of it is built from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlm.attention import DecoderAttention, MixerOptions
from vlm.config.options import Options
from vlm.layers.activations import Activation
from vlm.layers.norms import NormKind


class TrunkOptions(Options):
    """Shape of a stack of transformer blocks."""

    width: int = Field(gt=0, description="channels C")
    depth: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="query heads; C must be a multiple unless head_width is given")
    kv_heads: int | None = Field(None, gt=0, description="key and value heads (grouped queries); default: heads")
    head_width: int | None = Field(None, gt=0, description="channels of one head; default: width / heads")
    ffn_width: int = Field(gt=0, description="hidden channels of the feed-forward layer")
    ffn: Literal["mlp", "gated"] = Field("mlp", description="mlp: up, act, down; gated: act(gate) * up, down")
    activation: Activation = "gelu"
    norm: NormKind = "layernorm"
    norm_eps: float = Field(1e-5, gt=0)
    bias: bool = Field(True, description="biases in attention and feed-forward layers")
    qkv_bias: bool | None = Field(None, description="biases of queries, keys and values (Qwen2); default: bias")
    rope_theta: float | None = Field(None, gt=0, description="base of rotary positions; none: no rotary positions")
    mixer: MixerOptions | None = Field(None, description="recurrent layer in place of attention; see vlm.models.recurrent")
    attention: DecoderAttention | None = Field(None, description="what queries see; see vlm.models.attending, vlm.models.far")
    causal: bool = Field(True, description="of a decoder loop: positions see none after them")
