"""The SigLIP layout (`SiglipModel`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.config.options import Options
from vlm.models.dual_encoder import DualEncoderOptions, PictureOptions
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

_PACKED = "vision_model.head.attention.in_proj_"
_PARTS = ("q", "k", "v")


class SiglipLayout(PublishedLayout):
    """No class token, attention pooling, bidirectional unmasked text pooled at its last position, scale and bias."""

    model_type = "siglip"
    architecture = "SiglipModel"
    prefixes = (
        ("vision.patch.", "vision_model.embeddings.patch_embedding."),
        ("vision.position", "vision_model.embeddings.position_embedding.weight"),
        ("vision.trunk.blocks.", "vision_model.encoder.layers."),
        ("vision.post_norm.", "vision_model.post_layernorm."),
        ("vision.pool.probe", "vision_model.head.probe"),
        ("vision.pool.attention.out.", "vision_model.head.attention.out_proj."),
        ("vision.pool.attention.", "vision_model.head.attention."),
        ("vision.pool.norm.", "vision_model.head.layernorm."),
        ("vision.pool.ffn.up.", "vision_model.head.mlp.fc1."),
        ("vision.pool.ffn.down.", "vision_model.head.mlp.fc2."),
        ("text.tokens.", "text_model.embeddings.token_embedding."),
        ("text.position", "text_model.embeddings.position_embedding.weight"),
        ("text.trunk.blocks.", "text_model.encoder.layers."),
        ("text.post_norm.", "text_model.final_layer_norm."),
        ("text.projection.", "text_model.head."),
        ("log_scale", "logit_scale"),
        ("bias", "logit_bias"),
    )
    inner = TOWER_INNER

    def expresses(self, options: Options) -> bool:
        return (
            isinstance(options, DualEncoderOptions)
            and options.knowledge is None
            and isinstance(options.vision, VitOptions)
            and options.bias is not None
            and not options.project_vision
            and not options.vision.class_token
            and not options.vision.pre_norm
            and options.vision.patch_bias
            and options.vision.pool == "attention"
            and options.vision.merge is None
            and options.text.prompt is None
            and options.text.attention == "bidirectional"
            and not options.text.mask_padding
            and options.text.pool == "last"
            and options.text.projection_bias
        )

    def to_config(self, options: DualEncoderOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
        text = text_config(options.text, vocabulary) | {
            "model_type": "siglip_text_model",
            "projection_size": options.embed_dim,
            "eos_token_id": vocabulary.special.get("eos"),
        }
        assert isinstance(options.vision, VitOptions)  # `expresses` lets no other through
        vision = vision_config(options.vision) | {"model_type": "siglip_vision_model"}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "text_config": text,
            "vision_config": vision,
        }

    def from_config(self, config: dict[str, Any]) -> DualEncoderOptions:
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        shared: dict[str, Any] = {"activation": "gelu_tanh", "eps": 1e-6, "defaults": defaults}
        width = text.get("projection_size") or text.get("hidden_size", 768)
        return DualEncoderOptions(
            embed_dim=width,
            project_vision=False,
            log_scale=float(torch.tensor(10.0).log()),
            max_scale=None,
            bias=-10.0,
            pictures=PictureOptions(resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
            vision=VitOptions(
                **tower_fields(vision, **shared),
                **patch_fields(vision, image_size=224, patch_size=16),
                class_token=False,
                pre_norm=False,
                patch_bias=True,
                pool="attention",
            ),
            text=TextOptions(
                **tower_fields(text, **shared),
                length=text.get("max_position_embeddings", 64),
                vocab_size=text.get("vocab_size", 32000),
                attention="bidirectional",
                mask_padding=False,
                pool="last",
                projection_bias=True,
            ),
        )

    def reshape_out(self, tensors: dict[str, Tensor], options: DualEncoderOptions) -> dict[str, Tensor]:
        vision_patches_out(tensors, options.vision.patch_size)
        for end in ("weight", "bias"):
            parts = [tensors.pop(f"vision_model.head.attention.{part}.{end}") for part in _PARTS]
            tensors[_PACKED + end] = torch.cat(parts)
        for name in ("logit_scale", "logit_bias"):
            tensors[name] = tensors[name].reshape(1)
        return tensors

    def reshape_in(self, tensors: dict[str, Tensor], options: DualEncoderOptions) -> dict[str, Tensor]:
        tensors = dict(tensors)
        vision_patches_in(tensors)
        for end in ("weight", "bias"):
            packed = tensors.pop(_PACKED + end, None)
            if packed is not None:
                for part, tensor in zip(_PARTS, packed.chunk(3)):
                    tensors[f"vision_model.head.attention.{part}.{end}"] = tensor
        for name in ("logit_scale", "logit_bias"):
            if name in tensors:
                tensors[name] = tensors[name].reshape(())
        return tensors


SIGLIP = SiglipLayout()
