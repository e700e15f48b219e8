"""The Swin V2 layout (`Swinv2Model`, and with classes `Swinv2ForImageClassification`)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from vlm.config.options import Options
from vlm.models.layouts.base import ACTIVATIONS, PublishedLayout, activation_named
from vlm.models.swin import SwinOptions
from vlm.models.vision import VisionOptions
from vlm.types import VocabularyLayout

_BASE = "swinv2."
_OUTSIDE = (
    ("patch.", "embeddings.patch_embeddings.projection."),
    ("patch_norm.", "embeddings.norm."),
    ("mask_token", "embeddings.mask_token"),
    ("norm.", "layernorm."),
)
_MERGE = (("merge.", "downsample."),)
_INSIDE = (
    ("attention.qkv.", "attention.self.qkv."),
    ("attention.q_bias", "attention.self.query.bias"),
    ("attention.v_bias", "attention.self.value.bias"),
    ("attention.log_scale", "attention.self.logit_scale"),
    ("attention.position.hidden.", "attention.self.continuous_position_bias_mlp.0."),
    ("attention.position.out.", "attention.self.continuous_position_bias_mlp.2."),
    ("attention.out.", "attention.output.dense."),
    ("norm1.", "layernorm_before."),
    ("up.", "intermediate.dense."),
    ("down.", "output.dense."),
    ("norm2.", "layernorm_after."),
)
_OURS = re.compile(r"stages\.(\d+)\.(?:blocks\.(\d+)\.)?")
_THEIRS = re.compile(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)\.)?")
_FIXED: dict[str, Any] = {
    "num_channels": 3, "use_absolute_embeddings": False, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0
}
"""Fields of a config that we cannot set otherwise."""
_COMPUTED = (".relative_coords_table", ".relative_position_index")
"""Tensors of older checkpoints that follow from the window."""


class SwinLayout(PublishedLayout):
    """Queries, keys and values as three tensors, a convolution for the patches, `swinv2.` before all where there is a head."""

    model_type = "swinv2"
    architecture = "Swinv2Model"
    prefixes = ()
    inner = ()

    def expresses(self, options: Options) -> bool:
        tower = getattr(options, "tower", None)
        return (
            isinstance(options, VisionOptions)
            and isinstance(tower, SwinOptions)
            and tower.norm == "res-post"
            and not tower.main_norm_every
            and (tower.padding == "attended" or _no_padding(tower))
        )

    def to_config(self, options: VisionOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
        tower = _swin(options)
        config: dict[str, Any] = {
            "architectures": ["Swinv2ForImageClassification" if options.classes else self.architecture],
            "model_type": self.model_type,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "embed_dim": tower.width,
            "depths": list(tower.depths),
            "num_heads": list(tower.heads),
            "window_size": tower.window,
            "pretrained_window_sizes": list(tower.pretrained_windows or (0,) * len(tower.depths)),
            "mlp_ratio": tower.ffn_ratio,
            "qkv_bias": tower.qkv_bias,
            "drop_path_rate": tower.drop_path,
            "hidden_act": ACTIVATIONS[tower.activation],
            "layer_norm_eps": tower.norm_eps,
            "encoder_stride": tower.stride,
            **_FIXED,
        }
        if options.classes:
            config["id2label"] = {str(number): name for number, name in enumerate(options.classes)}
            config["label2id"] = {name: number for number, name in enumerate(options.classes)}
        return config

    def from_config(self, config: dict[str, Any]) -> VisionOptions:
        for name in ("num_channels", "use_absolute_embeddings"):
            if config.get(name, _FIXED[name]) != _FIXED[name]:
                raise ValueError(f"{name} = {config[name]!r} is not supported (expected {_FIXED[name]!r})")
        for name in ("image_size", "patch_size"):
            if not isinstance(config.get(name, 4), int):
                raise ValueError(f"{name} = {config[name]!r} is not supported (expected one number)")
        labels = config.get("id2label") or {} if "Swinv2ForImageClassification" in (config.get("architectures") or ()) else {}
        names = [str(labels[key]) for key in sorted(labels, key=int)]
        if len(set(names)) < len(names):  # of ImageNet's names some are given twice
            names = [f"{number} {name}" for number, name in enumerate(names)]
        windows = tuple(config.get("pretrained_window_sizes") or ())
        return VisionOptions(
            tower=SwinOptions(
                image_size=config.get("image_size", 224),
                patch_size=config.get("patch_size", 4),
                width=config.get("embed_dim", 96),
                depths=tuple(config.get("depths", (2, 2, 6, 2))),
                heads=tuple(config.get("num_heads", (3, 6, 12, 24))),
                window=config.get("window_size", 7),
                pretrained_windows=windows if any(windows) else (),
                ffn_ratio=config.get("mlp_ratio", 4.0),
                activation=activation_named(config.get("hidden_act", "gelu")),
                qkv_bias=config.get("qkv_bias", True),
                norm_eps=config.get("layer_norm_eps", 1e-5),
                drop_path=config.get("drop_path_rate", 0.1),
                padding="attended",
                mask_token="Swinv2ForMaskedImageModeling" in (config.get("architectures") or ()),
            ),
            classes=tuple(names),
        )

    def published_name(self, ours: str) -> str:
        if ours.startswith("head."):
            return "classifier." + ours.removeprefix("head.")
        name = ours.removeprefix("tower.")
        found = _OURS.match(name)
        if found is None:
            return _swapped(name, _OUTSIDE, 0)
        stage, block = found.groups()
        rest = name[found.end() :]
        if block is None:
            return f"encoder.layers.{stage}.{_swapped(rest, _MERGE, 0)}"
        return f"encoder.layers.{stage}.blocks.{block}.{_swapped(rest, _INSIDE, 0)}"

    def to_published(self, tensors: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            theirs, value = self.published_name(name), tensor
            if theirs.endswith("projection.weight"):
                p = _swin(options).patch_size
                value = value.reshape(-1, 3, p, p)
            elif theirs.endswith("logit_scale"):
                value = value.reshape(-1, 1, 1)
            elif theirs.endswith("mask_token"):
                value = value.reshape(1, 1, -1)
            elif theirs.endswith("self.qkv.weight"):
                for part, chunk in zip(("query", "key", "value"), value.chunk(3)):
                    out[self._placed(theirs.replace("qkv", part), options)] = chunk
                continue
            out[self._placed(theirs, options)] = value
        return out

    @staticmethod
    def _placed(name: str, options: Any) -> str:
        return _BASE + name if options.classes and not name.startswith("classifier.") else name

    def from_published(self, tensors: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        """Heads that the options do not have (the decoder of masked pictures) are left out."""
        out: dict[str, Tensor] = {}
        apart: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.endswith(_COMPUTED) or name.startswith("decoder.") or (name.startswith("classifier.") and not options.classes):
                continue
            if name.startswith("classifier."):
                out["head." + name.removeprefix("classifier.")] = tensor
                continue
            ours, value = "tower." + _our_name(name.removeprefix(_BASE)), tensor
            part = re.fullmatch(r"(.*\.attention)\.self\.(query|key|value)\.weight", ours)
            if part is not None:
                apart.setdefault(part[1], {})[part[2]] = tensor
                continue
            if ours == "tower.mask_token" and not _swin(options).mask_token:
                continue
            if ours == "tower.patch.weight":
                value = value.reshape(value.shape[0], -1)
            elif ours.endswith((".log_scale", ".mask_token")):
                value = value.reshape(-1)
            out[ours] = value
        for place, three in apart.items():
            if len(three) == 3:  # else the tensor that is missing is named by who fills the model
                out[f"{place}.qkv.weight"] = torch.cat([three["query"], three["key"], three["value"]])
        return out


def _our_name(name: str) -> str:
    found = _THEIRS.match(name)
    if found is None:
        return _swapped(name, _OUTSIDE, 1)
    stage, block = found.groups()
    rest = name[found.end() :]
    if block is None:
        return f"stages.{stage}.{_swapped(rest, _MERGE, 1)}"
    return f"stages.{stage}.blocks.{block}.{_swapped(rest, _INSIDE, 1)}"


def _swapped(name: str, pairs: tuple[tuple[str, str], ...], source: int) -> str:
    for pair in pairs:
        if name.startswith(pair[source]):
            return pair[1 - source] + name[len(pair[source]) :]
    return name


def _swin(options: Any) -> SwinOptions:
    tower = options.tower
    assert isinstance(tower, SwinOptions)
    return tower


def _no_padding(tower: SwinOptions) -> bool:
    """Whether pictures of the tower's own size fill whole windows at every stage."""
    return tower.image_size % tower.stride == 0 and all(shape.side % shape.window == 0 for shape in tower.stages)


SWIN = SwinLayout()
