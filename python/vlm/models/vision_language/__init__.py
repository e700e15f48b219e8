"""The `vision-language` family: towers, a connector and a language model."""

from vlm.models.vision_language.model import VisionLanguageModel, VisionLanguageOptions
from vlm.models.vision_language.options import (
    CrossAttentionOptions,
    HybridOptions,
    PrefixOptions,
    VitTowerOptions,
)

__all__ = [
    "CrossAttentionOptions",
    "HybridOptions",
    "PrefixOptions",
    "VisionLanguageModel",
    "VisionLanguageOptions",
    "VitTowerOptions",
]
