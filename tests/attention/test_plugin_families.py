"""Tiny random models of many families of transformers: the native attention gives what their eager attention gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlm.attention import plugin
from vlm.ops import masks
from vlm.ops.backend import Backend, backend

transformers = pytest.importorskip("transformers")

TEXT: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ENCODER = {name: value for name, value in TEXT.items() if name not in ("num_key_value_heads", "bos_token_id", "eos_token_id")}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4,
          "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
          "num_key_value_heads": 4}
MIXED = {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
SEQUENCES = {"vocab_size": 64, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 128}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "pad_token_id": 0}
PICTURE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {}, "Mistral": {"sliding_window": 6}, "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1}, "Qwen2": {},
    "Qwen3": {"head_dim": 8}, "Gemma": {"head_dim": 8}, "Phi": {}, "Phi3": {}, "Olmo2": {}, "Cohere": {}, "Granite": {}, "SmolLM3": {},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "GptOss": {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}, "DeepseekV3": LATENT,
    "DeepseekV32": {**LATENT, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}, "ModernBertDecoder": {"local_attention": 8},
}
MODELS: dict[str, dict[str, Any]] = {
    **{f"{name}ForCausalLM": TEXT | more for name, more in DECODERS.items()},
    "GPTNeoXForCausalLM": ENCODER, "GPT2LMHeadModel": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "BertModel": ENCODER, "RobertaModel": ENCODER, "ModernBertModel": {**ENCODER, "local_attention": 8, "global_attn_every_n_layers": 2},
    "DistilBertModel": {"vocab_size": 64, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "pad_token_id": 0},
    "BartForConditionalGeneration": SEQUENCES, "T5ForConditionalGeneration": T5,
    "ViTModel": PICTURE, "Dinov2Model": PICTURE, "CLIPVisionModel": PICTURE, "SiglipVisionModel": PICTURE, "PixtralVisionModel": PICTURE,
    "LlavaForConditionalGeneration": {"text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 60,
                                      "vision_config": {**PICTURE, "model_type": "clip_vision_model"}},
    "PaliGemmaForConditionalGeneration": {
        "text_config": {**TEXT, "model_type": "gemma", "head_dim": 8}, "image_token_index": 60, "projection_dim": 32,
        "vision_config": {**PICTURE, "model_type": "siglip_vision_model", "projection_dim": 32, "vision_use_head": False}},
}
QUICK = ("LlamaForCausalLM", "GptOssForCausalLM", "DeepseekV32ForCausalLM", "T5ForConditionalGeneration",
         "PaliGemmaForConditionalGeneration")
NAMES = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.long]) for name in MODELS]


def tiny(name: str) -> Any:
    """A model in evaluation mode whose attention is far from uniform."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(kind.config_class(**MODELS[name])).eval()
    with torch.no_grad():
        for label, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
            if "sink" in label:
                parameter.normal_()
    plugin.register()
    return model


def inputs(name: str, padding: str) -> dict[str, Tensor]:
    ids, keep, pixels = torch.randint(3, 60, (2, 19)), torch.ones(2, 19, dtype=torch.long), torch.randn(2, 3, 16, 16)
    if MODELS[name] is PICTURE:
        return {"pixel_values": pixels}
    if padding != "none":
        keep[0, slice(0, 5) if padding == "left" else slice(14, 19)] = 0
    given = {"input_ids": ids, "attention_mask": keep}
    if "vision_config" in MODELS[name]:
        given["input_ids"] = torch.cat([ids[:, :6], torch.full((2, 16), 60), ids[:, 6:]], 1)
        given["attention_mask"] = torch.cat([keep[:, :6], torch.ones_like(ids[:, :16]), keep[:, 6:]], 1)
        given["pixel_values"] = pixels
    if MODELS[name] in (SEQUENCES, T5):
        given["decoder_input_ids"] = ids[:, :9].clone()
    return given


def results(model: Any, implementation: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs at tokens that exist, and gradients. A bias of keys alone changes no softmax: its gradient is rounding, left out."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    out = model(**given, output_hidden_states=True)
    last = out["logits"] if "logits" in out else out["last_hidden_state"]
    found = {"last": last} | {f"hidden {i}": h for i, h in enumerate(out.get("hidden_states") or ())}
    keep = given.get("attention_mask")
    for label, each in found.items():
        found[label] = each * keep[..., None] if keep is not None and each.shape[:2] == keep.shape else each
    (found["last"] * torch.linspace(0, 1, last.shape[-1])).sum().backward()
    gradients = {label: p.grad.clone() for label, p in model.named_parameters() if p.grad is not None}
    idle = ("k_proj.bias", "key.bias", "k_lin.bias")
    return {label: each.detach() for label, each in (found | gradients).items() if not label.endswith(idle)}


@pytest.mark.parametrize("kind", ["auto", "native"])
@pytest.mark.parametrize("name", NAMES)
def test_logits_hidden_states_and_gradients_are_those_of_eager_attention(name: str, kind: Backend) -> None:
    model = tiny(name)
    for padding in ("none",) if MODELS[name] is PICTURE else ("none", "left", "right"):
        given = inputs(name, padding)
        expected = results(model, "eager", given)
        with backend(kind):
            got = results(model, plugin.NAME, given)
        assert got.keys() == expected.keys()
        for label, each in expected.items():
            torch.testing.assert_close(got[label], each, rtol=1e-3, atol=3e-4 * float(each.abs().max()) + 1e-5, msg=f"{padding} {label}")


@pytest.mark.parametrize("kind", ["auto", "native"])
@pytest.mark.parametrize("name", [p for p in NAMES if p.values[0].endswith(("ForCausalLM", "LMHeadModel"))])
def test_caches_chunks_beams_and_packed_texts(name: str, kind: Backend) -> None:
    model, given = tiny(name), inputs(name, "left")
    ids = given["input_ids"]

    def chunks(cache: Any) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits
                              for a, b in ((0, 8), (8, 13), (13, 14), (14, 19))], 1)

    def run(implementation: str) -> tuple[list[Tensor], list[Tensor]]:
        model.set_attn_implementation(implementation)
        positions = torch.cat([torch.arange(7), torch.arange(12)])[None]
        with torch.no_grad():
            packed = model(ids[:1], position_ids=positions, use_cache=False).logits
        texts = [model.generate(**given, max_new_tokens=6, do_sample=False, num_beams=beams, pad_token_id=0) for beams in (1, 3)]
        caches = (transformers.DynamicCache(config=model.config), transformers.StaticCache(config=model.config, max_cache_len=32))
        return texts, [packed, *(chunks(cache) for cache in caches)]

    texts, logits = run("eager")
    with backend(kind):
        got_texts, got_logits = run(plugin.NAME)
    assert all(torch.equal(a, b) for a, b in zip(got_texts, texts, strict=True))
    for a, b in zip(got_logits, logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("atom", [masks.Window(5), masks.Prefix(torch.tensor([4, 9])), masks.BlockCausal(4), masks.Lambda(5, 2),
                                  masks.Segments((torch.arange(19) // 7).expand(2, -1)), masks.SymmetricWindow(6)])
def test_mask_programs_equal_the_same_mask_of_four_axes(atom: masks.Atom) -> None:
    model, ids = tiny("LlamaForCausalLM"), torch.randint(3, 60, (2, 19))
    allow = masks.MaskProgram(atom).allow(masks.MaskShape(2, 4, 19, 19, ids.device))
    assert allow is not None
    allow = allow.expand(2, -1, -1, -1)
    model.set_attn_implementation("eager")
    expected = model(ids, attention_mask=torch.where(allow, 0.0, torch.finfo(torch.float32).min)).logits
    plugin.use(model)
    for kind in ("auto", "native"):
        with backend(kind):  # type: ignore[arg-type]
            torch.testing.assert_close(model(ids, mask_program=atom).logits, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(model(ids, attention_mask=allow).logits, expected, rtol=1e-3, atol=1e-4)


def test_models_with_attention_of_their_own_are_refused_by_name() -> None:
    config = transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    with pytest.raises(ValueError, match="BloomModel"):
        plugin.use(transformers.BloomForCausalLM(config))


def test_attention_probabilities_and_unknown_features_are_refused() -> None:
    model, ids = tiny("LlamaForCausalLM"), torch.randint(3, 60, (2, 19))
    model.set_attn_implementation(plugin.NAME)
    with pytest.raises(ValueError, match="LlamaAttention.*output_attentions"):
        model(ids, output_attentions=True)
    plugin.use(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM.*output_attentions"):
        model(ids, output_attentions=True)
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ValueError, match="chosen blocks"):
        plugin.attention_forward(torch.nn.Module(), q, q, q, None, block_indices=torch.zeros(1))


@pytest.mark.parametrize("kind", ["auto", "native"])
def test_sinks_of_each_query_and_packed_bounds(kind: Backend) -> None:
    q, k, v = (torch.randn(1, 2, 9, 8) for _ in range(3))
    sinks = torch.randn(1, 2, 9, 1)
    weights = torch.softmax(torch.cat([q @ k.transpose(2, 3) * 0.3, sinks], 3), 3)[..., :-1]
    with backend(kind):
        got, _ = plugin.attention_forward(torch.nn.Module(), q, k, v, None, scaling=0.3, is_causal=False, sinks=sinks)
        bounds = torch.tensor([0, 4, 9], dtype=torch.int32)
        packed, _ = plugin.attention_forward(torch.nn.Module(), q, k, v, None, is_causal=True, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
    torch.testing.assert_close(got, (weights @ v).transpose(1, 2))
    parts = [torch.nn.functional.scaled_dot_product_attention(*(t[:, :, a:b] for t in (q, k, v)), is_causal=True)
             for a, b in ((0, 4), (4, 9))]
    torch.testing.assert_close(packed, torch.cat(parts, 2).transpose(1, 2))


def test_a_mask_written_to_is_read_anew() -> None:
    q = torch.randn(1, 2, 9, 8)
    mask = torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with backend("native"):
        first, _ = plugin.attention_forward(torch.nn.Module(), q, q, q, mask)
        mask[:, :, :, 2:4] = False
        second, _ = plugin.attention_forward(torch.nn.Module(), q, q, q, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(second, expected)
    assert not torch.allclose(first, second)
