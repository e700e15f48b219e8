"""The layers of which connectors and models are made, and the stack of them: attention, feed-forward, norms, positions."""

from vlm.layers.activations import Activation, activation_of
from vlm.layers.attention import Attention
from vlm.layers.feed_forward import FeedForward
from vlm.layers.norms import NormKind, RmsNorm, norm_of, normalise
from vlm.layers.options import TrunkOptions
from vlm.layers.rotary import rotary_tables, rotate
from vlm.layers.trunk import Block, Trunk, segment_bias

__all__ = [
    "Activation",
    "Attention",
    "Block",
    "FeedForward",
    "NormKind",
    "RmsNorm",
    "Trunk",
    "TrunkOptions",
    "activation_of",
    "norm_of",
    "normalise",
    "rotary_tables",
    "rotate",
    "segment_bias",
]
