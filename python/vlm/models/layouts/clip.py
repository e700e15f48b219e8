"""The CLIP layout (`CLIPModel`)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm.config.options import Options
from vlm.models.dual_encoder import DualEncoderOptions
from vlm.models.layouts.base import ACTIVATIONS, PublishedLayout, activation_named
from vlm.models.towers import TextOptions, VitOptions
from vlm.types import VocabularyLayout

TOWER_INNER = (
    ("norm1.", "layer_norm1."),
    ("attention.q.", "self_attn.q_proj."),
    ("attention.k.", "self_attn.k_proj."),
    ("attention.v.", "self_attn.v_proj."),
    ("attention.out.", "self_attn.out_proj."),
    ("norm2.", "layer_norm2."),
    ("ffn.up.", "mlp.fc1."),
    ("ffn.down.", "mlp.fc2."),
)


def tower_config(tower: VitOptions | TextOptions) -> dict[str, Any]:
    """The fields that published vision and text configs share."""
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.ffn_width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def tower_fields(config: dict[str, Any], *, activation: str, eps: float, defaults: dict[str, int]) -> dict[str, Any]:
    """Our tower options from a published tower config; published configs leave out what equals the class's default."""
    width = config.get("hidden_size", defaults["hidden_size"])
    return {
        "width": width,
        "depth": config.get("num_hidden_layers", 12),
        "heads": config.get("num_attention_heads", defaults["num_attention_heads"]),
        "ffn_ratio": config.get("intermediate_size", defaults["intermediate_size"]) / width,
        "activation": activation_named(config.get("hidden_act", activation)),
        "norm_eps": config.get("layer_norm_eps", eps),
    }


def vision_patches_out(tensors: dict[str, Tensor], patch: int) -> None:
    """Linear [C, 3 p p] to the published convolution's [C, 3, p, p], in place."""
    name = "vision_model.embeddings.patch_embedding.weight"
    tensors[name] = tensors[name].reshape(-1, 3, patch, patch)


def vision_patches_in(tensors: dict[str, Tensor]) -> None:
    """The inverse, in place."""
    name = "vision_model.embeddings.patch_embedding.weight"
    if name in tensors:
        tensors[name] = tensors[name].reshape(tensors[name].shape[0], -1)


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
            and isinstance(options.vision, VitOptions)
            and options.bias is None
            and options.project_vision
            and options.vision.class_token
            and options.vision.pre_norm
            and not options.vision.patch_bias
            and options.vision.pool == "cls"
            and options.vision.merge is None
            and options.text.attention == "causal"
            and options.text.pool == "eos"
            and not options.text.projection_bias
        )

    def to_config(self, options: DualEncoderOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
        special = vocabulary.special
        text = tower_config(options.text) | {
            "model_type": "clip_text_model",
            "vocab_size": options.text.vocab_size,
            "max_position_embeddings": options.text.length,
            "projection_dim": options.embed_dim,
            "bos_token_id": special.get("bos"),
            "eos_token_id": options.text.eos_id,
            "pad_token_id": special.get("pad"),
        }
        assert isinstance(options.vision, VitOptions)  # `expresses` lets no other through
        vision = tower_config(options.vision) | {
            "model_type": "clip_vision_model",
            "image_size": options.vision.image_size,
            "patch_size": options.vision.patch_size,
            "projection_dim": options.embed_dim,
        }
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "projection_dim": options.embed_dim,
            "logit_scale_init_value": options.log_scale,
            "text_config": text,
            "vision_config": vision,
        }

    def from_config(self, config: dict[str, Any]) -> DualEncoderOptions:
        text, vision = config.get("text_config") or {}, config.get("vision_config") or {}
        text_defaults = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
        vision_defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        return DualEncoderOptions(
            embed_dim=config.get("projection_dim", 512),
            vision=VitOptions(
                **tower_fields(vision, activation="quick_gelu", eps=1e-5, defaults=vision_defaults),
                image_size=vision.get("image_size", 224),
                patch_size=vision.get("patch_size", 32),
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
