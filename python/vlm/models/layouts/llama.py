"""The Llama layout (`LlamaForCausalLM`) and Qwen2's (`Qwen2ForCausalLM`): the same names, three more biases."""

from __future__ import annotations

from typing import Any, ClassVar

from vlm.config.options import Options
from vlm.models.language import LanguageOptions
from vlm.models.layouts.base import PublishedLayout, activation_named
from vlm.types import VocabularyLayout


class LlamaLayout(PublishedLayout):
    """RMS norm, gated SiLU feed-forward, rotary positions, no biases."""

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    qkv_bias: ClassVar[bool] = False
    absent: ClassVar[tuple[str, ...]] = ()
    """Fields of Llama's config that this one does not have."""

    prefixes = (
        ("tokens.", "model.embed_tokens."),
        ("trunk.blocks.", "model.layers."),
        ("post_norm.", "model.norm."),
        ("head.", "lm_head."),
    )
    inner = (
        ("norm1.", "input_layernorm."),
        ("attention.q.", "self_attn.q_proj."),
        ("attention.k.", "self_attn.k_proj."),
        ("attention.v.", "self_attn.v_proj."),
        ("attention.out.", "self_attn.o_proj."),
        ("norm2.", "post_attention_layernorm."),
        ("ffn.gate.", "mlp.gate_proj."),
        ("ffn.up.", "mlp.up_proj."),
        ("ffn.down.", "mlp.down_proj."),
    )

    def expresses(self, options: Options) -> bool:
        return (
            isinstance(options, LanguageOptions)
            and options.norm == "rmsnorm"
            and options.ffn == "gated"
            and options.activation == "silu"
            and not options.bias
            and options.sees_all_before
            and not options.embed_scale
            and bool(options.qkv_bias) == self.qkv_bias
            and (options.head_width or options.width // options.heads) == self._head_width(options)
        )

    def _head_width(self, options: LanguageOptions) -> int:
        """The head width that the published form can say."""
        return options.head_width or options.width // options.heads

    def to_config(self, options: LanguageOptions, vocabulary: VocabularyLayout) -> dict[str, Any]:
        special = vocabulary.special
        config = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_size": options.width,
            "intermediate_size": options.ffn_width,
            "num_hidden_layers": options.depth,
            "num_attention_heads": options.heads,
            "num_key_value_heads": options.kv_heads or options.heads,
            "head_dim": options.head_width or options.width // options.heads,
            "hidden_act": "silu",
            "rms_norm_eps": options.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
            "max_position_embeddings": options.length,
            "vocab_size": options.vocab_size,
            "tie_word_embeddings": options.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": special.get("bos"),
            "eos_token_id": special.get("eos"),
            "pad_token_id": special.get("pad"),
        }
        for name in self.absent:
            del config[name]
        return config

    def from_config(self, config: dict[str, Any]) -> LanguageOptions:
        rope = config.get("rope_parameters") or {}
        # Both names of the kind, in both tables: a config that was edited by hand may hold the old one beside the new.
        for table in (rope, config.get("rope_scaling") or {}):
            for kind in (table.get("rope_type"), table.get("type")):
                if kind not in (None, "default"):
                    raise ValueError(f"rotary scaling {kind!r} is not supported (expected 'default')")
        for name in ("attention_bias", "mlp_bias"):
            if config.get(name):
                raise ValueError(f"{name} = true is not supported")
        return LanguageOptions(
            width=config["hidden_size"],
            depth=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config.get("num_key_value_heads"),
            head_width=config.get("head_dim"),
            ffn_width=config["intermediate_size"],
            activation=activation_named(config.get("hidden_act", "silu")),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", config.get("rope_theta", 10000.0)),
            length=config.get("max_position_embeddings", 2048),
            vocab_size=config["vocab_size"],
            tie_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=self.qkv_bias or None,
        )


class Qwen2Layout(LlamaLayout):
    """Llama with biases of queries, keys and values. Windowed attention is not supported."""

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    qkv_bias = True
    absent = ("head_dim", "attention_bias", "mlp_bias")

    def _head_width(self, options: LanguageOptions) -> int:
        return options.width // options.heads

    def from_config(self, config: dict[str, Any]) -> LanguageOptions:
        if config.get("use_sliding_window"):
            raise ValueError("use_sliding_window = true is not supported")
        return super().from_config({"max_position_embeddings": 32768, **config})


LLAMA = LlamaLayout()
QWEN2 = Qwen2Layout()
