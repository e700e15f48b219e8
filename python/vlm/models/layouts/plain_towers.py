"""What the published layouts of plain transformer towers share: names inside a block, config fields, the patch convolution."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm.models.layouts.base import ACTIVATIONS, activation_named
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


def text_config(text: TextOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
    """The fields that published text configs share."""
    return tower_config(text) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.length,
        "bos_token_id": vocabulary.special.get("bos"),
        "pad_token_id": vocabulary.special.get("pad"),
    }


def vision_config(tower: VitOptions) -> dict[str, Any]:
    """The fields that published vision configs share."""
    return tower_config(tower) | {"image_size": tower.image_size, "patch_size": tower.patch_size}


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


def patch_fields(config: dict[str, Any], *, image_size: int, patch_size: int) -> dict[str, Any]:
    """Side of pictures and patches of a published tower config. 384 pixels in patches of 14 are 27 patches: the rest is left out."""
    size, patch = config.get("image_size", image_size), config.get("patch_size", patch_size)
    return {"image_size": size, "patch_size": patch, "drop_remainder": size % patch != 0}


def vision_patches_out(tensors: dict[str, Tensor], patch: int) -> None:
    """Linear [C, 3 p p] to the published convolution's [C, 3, p, p], in place."""
    name = "vision_model.embeddings.patch_embedding.weight"
    tensors[name] = tensors[name].reshape(-1, 3, patch, patch)


def vision_patches_in(tensors: dict[str, Tensor]) -> None:
    """The inverse, in place."""
    name = "vision_model.embeddings.patch_embedding.weight"
    if name in tensors:
        tensors[name] = tensors[name].reshape(tensors[name].shape[0], -1)
