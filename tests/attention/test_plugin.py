"""The native attention inside transformers models gives what torch's gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vlm import ops
from vlm.attention import ExactAttentionOptions, plugin

pytest.importorskip("transformers")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """Register the plug-in, and note how each call reaches the operator."""
    plugin.register()
    seen: list[dict[str, object]] = []
    real = ops.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
        seen.append(options)
        return real(q, k, v, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("vlm.attention.plugin.ops.attention", spy)
    return seen


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                        num_attention_heads=4, num_key_value_heads=2)).eval()


@pytest.mark.parametrize("padded", [False, True])
def test_a_causal_decoder_gives_the_same_logits_and_text(padded: bool, calls: list[dict[str, object]]) -> None:
    model = llama()
    ids, mask = torch.randint(0, 50, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    if padded:
        mask[0, :4] = 0
    model.set_attn_implementation("sdpa")
    expected, text = model(ids, attention_mask=mask).logits, model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert not calls
    model.set_attn_implementation(plugin.NAME)
    got = model(ids, attention_mask=mask).logits
    assert len(calls) == 2
    assert all(call["causal"] and call["bias"] is None for call in calls)  # tiles can be skipped, no dense mask
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0), text)


def test_an_arbitrary_mask_becomes_a_bias(calls: list[dict[str, object]]) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 5, 5) < 0.6
    mask |= torch.eye(5, dtype=torch.bool)
    got, weights = plugin.attention_forward(torch.nn.Module(), q, k, v, mask, scaling=0.2)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True)
    torch.testing.assert_close(got, expected.transpose(1, 2))
    assert weights is None
    assert calls[0]["bias"] is not None


def test_dropout_in_training_goes_to_torch(calls: list[dict[str, object]]) -> None:
    q = torch.randn(1, 2, 5, 8)
    module = torch.nn.Module()
    module.num_key_value_groups = 1  # type: ignore[assignment]
    out, _ = plugin.attention_forward(module, q, q, q, None, dropout=0.5, is_causal=False)
    assert out.shape == (1, 5, 2, 8)
    assert not calls


def test_soft_caps_are_refused() -> None:
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="soft cap"):
        plugin.attention_forward(torch.nn.Module(), q, q, q, None, softcap=30.0)


def test_the_exact_part_hands_its_options_to_the_operator() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8)
    part = ExactAttentionOptions(scale=0.5, alignment="top-left").build()
    expected = ops.attention(q, k, k, causal=True, alignment="top-left", scale=0.5)
    assert torch.equal(part(q, k, k, causal=True), expected)
