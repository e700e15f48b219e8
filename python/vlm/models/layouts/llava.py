"""The LLaVA layout (`LlavaForConditionalGeneration`): one CLIP or SigLIP tower, a two-layer projector, Llama or Qwen2."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlm.config.options import Options
from vlm.connectors import MlpOptions
from vlm.models.dual_encoder import PictureOptions
from vlm.models.layouts.base import ACTIVATIONS, PublishedLayout, activation_named
from vlm.models.layouts.clip import CLIP
from vlm.models.layouts.llama import LLAMA, QWEN2, LlamaLayout
from vlm.models.layouts.plain_towers import (
    patch_fields,
    tower_fields,
    vision_config,
    vision_patches_in,
    vision_patches_out,
)
from vlm.models.vision_language import PrefixOptions, VisionLanguageOptions, VitTowerOptions
from vlm.types import VocabularyLayout

TOWER = "main"
"""What the tower of a published directory is called."""
_TEXT_DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22016, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 151936},
}
"""Published text configs leave out what equals the class's default."""
_TEMPLATES = {"llama": "vicuna", "qwen2": "chatml"}
_TEXTS: dict[str, LlamaLayout] = {layout.model_type: layout for layout in (LLAMA, QWEN2)}


class LlavaLayout(PublishedLayout):
    """`layer` and `drop_class` are the published vision_feature_layer and select strategy; no norm is laid on the features."""

    model_type = "llava"
    architecture = "LlavaForConditionalGeneration"
    prefixes = ()
    inner = ()

    def expresses(self, options: Options) -> bool:
        if not isinstance(options, VisionLanguageOptions) or len(options.towers) != 1 or options.language is None:
            return False
        tower, connector, language = next(iter(options.towers.values())), options.connector, options.language
        return (
            isinstance(options.fusion, PrefixOptions)
            and options.tokens is None
            and options.tiler is None
            and not tower.norm
            and tower.merge is None
            and _tower_kind(tower) is not None
            and isinstance(connector, MlpOptions)
            and connector.depth == 2
            and connector.norm is None
            and connector.pre is None
            and connector.hidden in (None, language.width)
            and any(text.expresses(language) for text in _TEXTS.values())
        )

    def to_config(self, options: VisionLanguageOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
        tower, connector, language = next(iter(options.towers.values())), options.connector, options.language
        assert isinstance(connector, MlpOptions)
        assert language is not None
        text = next(layout for layout in _TEXTS.values() if layout.expresses(language))
        kind = _tower_kind(tower)
        vision = vision_config(tower.vit()) | {"model_type": f"{kind}_vision_model"}
        if kind == "siglip":
            vision["vision_use_head"] = False
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vision_config": vision,
            "text_config": text.to_config(language, vocabulary),
            "image_token_index": vocabulary.special["image"],
            "image_seq_length": tower.tokens,
            "projector_hidden_act": ACTIVATIONS[connector.activation],
            "multimodal_projector_bias": connector.bias,
            "vision_feature_layer": tower.layer,
            "vision_feature_select_strategy": _strategy(tower),
            "tie_word_embeddings": language.tie_embeddings,
        }

    def processor_config(self, options: VisionLanguageOptions) -> dict[str, Any]:
        """processor_config.json: how `LlavaProcessor` counts the positions of a picture."""
        tower = next(iter(options.towers.values()))
        return {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": tower.patch_size,
            "num_additional_image_tokens": int(tower.class_token),
            "vision_feature_select_strategy": _strategy(tower),
        }

    def from_config(self, config: dict[str, Any]) -> VisionLanguageOptions:
        vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
        kind = str(text.get("model_type", "llama"))
        if kind not in _TEXTS:
            raise ValueError(f"text_config.model_type {kind!r} is not supported (known: {', '.join(_TEXTS)})")
        language = _TEXTS[kind].from_config({**_TEXT_DEFAULTS[kind], **text})
        if config.get("tie_word_embeddings"):
            language = language.model_copy(update={"tie_embeddings": True})
        return VisionLanguageOptions(
            towers={TOWER: self._tower(config, vision)},
            connector=MlpOptions(
                depth=2,
                activation=activation_named(config.get("projector_hidden_act", "gelu")),
                bias=config.get("multimodal_projector_bias", True),
            ),
            language=language,
            template=_TEMPLATES[kind],
            length=language.length,
        )

    def _tower(self, config: dict[str, Any], vision: dict[str, Any]) -> VitTowerOptions:
        layer = config.get("vision_feature_layer", -2)
        if isinstance(layer, list) and len(layer) == 1:
            layer = layer[0]
        if type(layer) is not int:
            raise ValueError(f"vision_feature_layer {layer} is not supported (expected one layer)")
        strategy = config.get("vision_feature_select_strategy", "default")
        if strategy not in ("default", "full"):
            raise ValueError(f"vision_feature_select_strategy {strategy!r} is not supported (expected default or full)")
        kind = str(vision.get("model_type", "clip_vision_model"))
        defaults = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        read: dict[str, Any] = {"layer": layer, "norm": False}
        if kind == "clip_vision_model":
            return VitTowerOptions(
                **tower_fields(vision, activation="quick_gelu", eps=1e-5, defaults=defaults),
                **read,
                **patch_fields(vision, image_size=224, patch_size=32),
                drop_class=strategy == "default",
            )
        if kind != "siglip_vision_model":
            raise ValueError(f"vision_config.model_type {kind!r} is not supported (known: clip_vision_model, siglip_vision_model)")
        if strategy == "default":
            raise ValueError("vision_feature_select_strategy 'default' would drop the first patch of a tower without class token")
        return VitTowerOptions(
            **tower_fields(vision, activation="gelu_tanh", eps=1e-6, defaults=defaults),
            **read,
            **patch_fields(vision, image_size=224, patch_size=16),
            class_token=False,
            pre_norm=False,
            patch_bias=True,
            pictures=PictureOptions(resize="squash", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        )

    def published_name(self, ours: str) -> str:
        head, _, rest = ours.partition(".")
        if head == "towers":
            return "vision_tower." + CLIP.published_name("vision." + rest.partition(".")[2])
        if head == "language":
            return "language_model." + LLAMA.published_name(rest)
        number, _, leaf = rest.removeprefix("linears.").partition(".")
        return f"multi_modal_projector.linear_{int(number) + 1}.{leaf}" if head == "connector" else ours

    def to_published(self, tensors: dict[str, Tensor], options: VisionLanguageOptions) -> dict[str, Tensor]:
        out = {self.published_name(name): tensor for name, tensor in tensors.items()}
        patch = next(iter(options.towers.values())).vit().patch_size
        return _in_tower(out, lambda part: vision_patches_out(part, patch))

    def from_published(self, tensors: dict[str, Tensor], options: VisionLanguageOptions) -> dict[str, Tensor]:
        """Names of today's and of earlier transformers alike; a pooling head of the tower, never read, is left out."""
        tower = next(iter(options.towers))
        published = {_usual(name): tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
        out = {}
        for name, tensor in _in_tower(published, vision_patches_in).items():
            head, _, rest = name.partition(".")
            if head == "vision_tower":
                if not rest.startswith("vision_model.head."):
                    (ours,) = CLIP.from_published({rest: tensor}, None)
                    out[f"towers.{tower}." + ours.removeprefix("vision.")] = tensor
            elif head == "language_model":
                (ours,) = LLAMA.from_published({rest: tensor}, None)
                assert options.language is not None
                if ours != "head.weight" or not options.language.tie_embeddings:
                    out["language." + ours] = tensor
            elif head == "multi_modal_projector" and rest.startswith(("linear_1.", "linear_2.")):
                out[f"connector.linears.{int(rest[7]) - 1}.{rest[9:]}"] = tensor
            else:
                out[name] = tensor
        return out


def _tower_kind(tower: VitTowerOptions) -> str | None:
    if tower.class_token and tower.pre_norm and not tower.patch_bias:
        return "clip"
    if not tower.class_token and not tower.pre_norm and tower.patch_bias:
        return "siglip"
    return None


def _strategy(tower: VitTowerOptions) -> str:
    return "default" if tower.class_token and tower.drop_class else "full"


def _usual(name: str) -> str:
    """A published name in the form that most directories have."""
    for part in ("vision_tower.", "language_model.", "multi_modal_projector."):
        if name.startswith("model." + part):
            name = name.removeprefix("model.")
    if name.startswith("lm_head."):
        return "language_model." + name
    if name.startswith("language_model.") and not name.startswith(("language_model.model.", "language_model.lm_head.")):
        return name.replace("language_model.", "language_model.model.", 1)
    if name.startswith("vision_tower.") and not name.startswith("vision_tower.vision_model."):
        return name.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return name


def _in_tower(tensors: dict[str, Tensor], change: Any) -> dict[str, Tensor]:
    """The tensors with those of the tower changed in place under the names that they have in a whole CLIP model."""
    inside = {name.removeprefix("vision_tower."): t for name, t in tensors.items() if name.startswith("vision_tower.")}
    change(inside)
    outside = {name: t for name, t in tensors.items() if not name.startswith("vision_tower.")}
    return {f"vision_tower.{name}": t for name, t in inside.items()} | outside


LLAVA = LlavaLayout()
