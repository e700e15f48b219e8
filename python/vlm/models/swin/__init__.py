"""Swin Transformer V2: a windowed tower with cosine attention and a continuous position bias. Source: swin-v2."""

from vlm.models.swin.blocks import ContinuousBias, SwinAttention, SwinBlock
from vlm.models.swin.options import SwinOptions
from vlm.models.swin.tower import SwinTower

__all__ = ["ContinuousBias", "SwinAttention", "SwinBlock", "SwinOptions", "SwinTower"]
