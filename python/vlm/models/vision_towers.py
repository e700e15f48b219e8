"""The vision towers: what `[model.vision]` of a dual encoder and `[model.tower]` of a vision model may be."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from vlm.models.swin import SwinOptions, SwinTower
from vlm.models.towers import VisionTransformer, VitOptions
from vlm.models.video import VideoOptions, VideoTower


def _kind(value: Any) -> str:
    """A table without a kind is a vit: so presets and directories said it before there were others."""
    return str(value.get("kind", "vit") if isinstance(value, dict) else getattr(value, "kind", "vit"))


VisionTowerOptions = Annotated[
    Annotated[VitOptions, Tag("vit")] | Annotated[SwinOptions, Tag("swin")] | Annotated[VideoOptions, Tag("video")],
    Discriminator(_kind),
]


def build_tower(
    options: VitOptions | SwinOptions | VideoOptions, embed_dim: int, *, project: bool = True
) -> VisionTransformer | SwinTower | VideoTower:
    """A tower of pictures [B, 3, S, S]: called with them and layers it gives (tokens, pooled, hidden states)."""
    if isinstance(options, SwinOptions):
        return SwinTower(options, embed_dim, project=project)
    if isinstance(options, VideoOptions):
        return VideoTower(options, embed_dim, project=project)
    return VisionTransformer(options, embed_dim, project=project)
