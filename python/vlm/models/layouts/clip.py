"""The CLIP layout (`CLIPModel`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm.config.options import Options
from vlm.models.dual_encoder import DualEncoderOptions
from vlm.models.layouts.base import PublishedLayout
from vlm.models.layouts.plain_towers import (
    TOWER_INNER,
    patch_fields,
    text_config,
    tower_fields,
    vision_config,
    vision_patches_in,
    vision_patches_out,
)
from vlm.models.towers import TextOptions, VitOptions
from vlm.types import VocabularyLayout


class ClipLayout(PublishedLayout):
    """Class token, pre-norm, causal text pooled at eos, two projections, no bias."""

    model_type = "clip"
    architecture = "CLIPModel"
    prefixes = (
        ("vision.patch.", "vision_model.embeddings.patch_embedding."),
        ("vision.class_token", "vision_model.embeddings.class_embedding"),
        ("vision.position", "vision_model.embeddings.position_embedding.weight"),
        ("vision.pre_norm.", "vision_model.pre_layrnorm."),
        ("vision.trunk.blocks.", "vision_model.encoder.layers."),
        ("vision.post_norm.", "vision_model.post_layernorm."),
        ("vision.projection.", "visual_projection."),
        ("text.tokens.", "text_model.embeddings.token_embedding."),
        ("text.position", "text_model.embeddings.position_embedding.weight"),
        ("text.trunk.blocks.", "text_model.encoder.layers."),
        ("text.post_norm.", "text_model.final_layer_norm."),
        ("text.projection.", "text_projection."),
        ("log_scale", "logit_scale"),
    )
    inner = TOWER_INNER

    def expresses(self, options: Options) -> bool:
        return (
            isinstance(options, DualEncoderOptions)
            and options.knowledge is None
            and isinstance(options.vision, VitOptions)
            and options.bias is None
            and options.project_vision
            and options.vision.class_token
            and options.vision.pre_norm
            and not options.vision.patch_bias
            and options.vision.pool == "cls"
            and options.vision.merge is None
            and options.text.prompt is None
            and options.text.attention == "causal"
            and options.text.pool == "eos"
            and not options.text.projection_bias
        )

    def to_config(self, options: DualEncoderOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
        text = text_config(options.text, vocabulary) | {
            "model_type": "clip_text_model",
            "projection_dim": options.embed_dim,
            "eos_token_id": options.text.eos_id,
        }
        assert isinstance(options.vision, VitOptions)  # `expresses` lets no other through
        vision = vision_config(options.vision) | {"model_type": "clip_vision_model", "projection_dim": options.embed_dim}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "projection_dim": options.embed_dim,
            "logit_scale_init_value": options.log_scale,
            "text_config": text,
            "vision_config": vision,
        }

    def from_config(self, config: dict[str, Any]) -> DualEncoderOptions:
        # The first published configs hold the towers twice; what ends in _dict is the one that counts.
        text, vision = ((config.get(f"{part}_config") or {}) | (config.get(f"{part}_config_dict") or {}) for part in ("text", "vision"))
        text_defaults = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        vision_defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        return DualEncoderOptions(
            embed_dim=config.get("projection_dim", 512),
            vision=VitOptions(
                **tower_fields(vision, activation="quick_gelu", eps=1e-5, defaults=vision_defaults),
                **patch_fields(vision, image_size=224, patch_size=32),
            ),
            text=TextOptions(
                **tower_fields(text, activation="quick_gelu", eps=1e-5, defaults=text_defaults),
                length=text.get("max_position_embeddings", 77),
                vocab_size=text.get("vocab_size", 49408),
                eos_id=text.get("eos_token_id", 49407),
            ),
        )

    def reshape_out(self, tensors: dict[str, Tensor], options: DualEncoderOptions) -> dict[str, Tensor]:
        vision_patches_out(tensors, options.vision.patch_size)
        return tensors

    def reshape_in(self, tensors: dict[str, Tensor], options: DualEncoderOptions) -> dict[str, Tensor]:
        tensors = dict(tensors)
        vision_patches_in(tensors)
        return tensors


CLIP = ClipLayout()
