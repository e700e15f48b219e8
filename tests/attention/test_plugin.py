"""The native attention inside transformers models gives what torch's gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vlm import ops
from vlm.attention import ExactAttentionOptions, plugin
from vlm.ops import masks
from vlm.ops.attention_bias import alibi_slopes
from vlm.ops.backend import backend

pytest.importorskip("transformers")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, object]]]:
    """Register the plug-in, note how each call reaches the operator, and send small calls there too."""
    plugin.register()
    seen: list[dict[str, object]] = []
    real = ops.attention

    def spy(q: Tensor, k: Tensor, v: Tensor, **options: object) -> object:
        seen.append(options)
        return real(q, k, v, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("vlm.attention.plugin.ops.attention", spy)
    with backend("native"):
        yield seen


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
    expected = model(ids, attention_mask=mask).logits
    text = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert not calls
    model.set_attn_implementation(plugin.NAME)
    got = model(ids, attention_mask=mask).logits
    assert len(calls) == 2
    assert all(call["causal"] and call["bias"] is None for call in calls)  # tiles can be skipped, no dense mask
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, pad_token_id=0), text)


def test_an_arbitrary_mask_stays_boolean(calls: list[dict[str, object]]) -> None:
    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    mask = torch.rand(2, 1, 5, 5) < 0.6
    mask |= torch.eye(5, dtype=torch.bool)
    for allow in (mask, mask | (torch.rand(2, 4, 5, 5) < 0.3)):
        got, weights = plugin.attention_forward(torch.nn.Module(), q, k, v, allow, scaling=0.2)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=allow, scale=0.2, enable_gqa=True)
        torch.testing.assert_close(got, expected.transpose(1, 2))
        assert weights is None
    assert all(call["bias"] is None and atoms(call) == ["Dense"] for call in calls)


def atoms(call: dict[str, object]) -> list[str]:
    return [type(atom).__name__ for atom in call["mask"]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("padded", [False, True])
def test_sliding_windows_and_packed_texts_become_ranges(padded: bool, calls: list[dict[str, object]]) -> None:
    q, k, v = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    i, ids = torch.arange(40), torch.arange(40) // 17
    keys = torch.ones(2, 40, dtype=torch.bool)
    if padded:
        keys[0, :6] = False
    causal = i[None, :] <= i[:, None]
    for allow in (causal & (i[:, None] - i[None, :] < 7), causal & (ids[:, None] == ids[None, :]), ids[:, None] == ids[None, :]):
        mask = allow & keys[:, None, None, :]
        got, _ = plugin.attention_forward(torch.nn.Module(), q, k, v, mask, scaling=0.2)
        seen = mask.any(-1)[:, 0]
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.2, enable_gqa=True)
        torch.testing.assert_close(got[seen], expected.transpose(1, 2)[seen])
        assert (got[~seen] == 0).all()
    assert all(call["bias"] is None and atoms(call) == ["Rows"] for call in calls)


def test_a_sliding_model_gives_the_same_logits(calls: list[dict[str, object]]) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, sliding_window=6,
                                             num_attention_heads=4, num_key_value_heads=2)).eval()
    ids = torch.randint(0, 50, (2, 30))
    model.set_attn_implementation("sdpa")
    expected = model(ids).logits
    model.set_attn_implementation(plugin.NAME)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert [atoms(call) for call in calls] == [["Rows"], ["Rows"]]


def test_soft_caps_reach_the_kernel() -> None:
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    q, k, v = torch.randn(1, 4, 7, 8) * 5, torch.randn(1, 2, 7, 8) * 5, torch.randn(1, 2, 7, 8)
    expected, _ = eager_attention_forward(module, q, k, v, None, scaling=0.3, softcap=4.0)
    got, _ = plugin.attention_forward(module, q, k, v, None, scaling=0.3, softcap=4.0, is_causal=False)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_attention_sinks_take_their_share() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    module.sinks = torch.randn(4)  # type: ignore[assignment]
    q, k, v = torch.randn(1, 4, 7, 8), torch.randn(1, 2, 7, 8), torch.randn(1, 2, 7, 8)
    expected, _ = eager_attention_forward(module, q, k, v, None, scaling=0.3)
    got, _ = plugin.attention_forward(module, q, k, v, None, scaling=0.3, s_aux=module.sinks, is_causal=False)
    torch.testing.assert_close(got, expected)


def test_dropout_in_training_follows_the_generator(calls: list[dict[str, object]]) -> None:
    q, eye = torch.randn(1, 2, 200, 8), torch.eye(200).expand(1, 2, 200, 200)
    torch.manual_seed(3)
    out, _ = plugin.attention_forward(torch.nn.Module(), q, q, eye, None, dropout=0.5, is_causal=False)
    other, _ = plugin.attention_forward(torch.nn.Module(), q, q, eye, None, dropout=0.5, is_causal=False)
    torch.manual_seed(3)
    again, _ = plugin.attention_forward(torch.nn.Module(), q, q, eye, None, dropout=0.5, is_causal=False)
    assert torch.equal(out, again)
    assert not torch.equal(out, other)
    assert abs((out == 0).float().mean() - 0.5) < 0.02
    assert len(calls) == 3


def test_the_exact_part_hands_its_options_to_the_operator() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 6, 8)
    part = ExactAttentionOptions(scale=0.5, alignment="top-left").build()
    expected = ops.attention(q, k, k, causal=True, alignment="top-left", scale=0.5)
    assert torch.equal(part(q, k, k, causal=True), expected)


def test_the_exact_part_builds_masks_and_biases_from_options() -> None:
    q, k = torch.randn(2, 4, 30, 8), torch.randn(2, 4, 30, 8)
    part = ExactAttentionOptions.model_validate({
        "mask": [{"kind": "window", "size": 9, "causal": False}, {"kind": "block-causal", "size": 4}], "softcap": 5.0, "heads": 4,
        "bias": {"kind": "alibi", "cap": 6}}).build()
    assert not list(part.parameters())
    expected = ops.attention(q, k, k, mask=masks.MaskProgram(masks.Window(9, causal=False), masks.BlockCausal(4)), softcap=5.0,
                             bias=ops.Alibi(alibi_slopes(4), cap=6))
    torch.testing.assert_close(part(q, k, k), expected)
    zero = torch.zeros(1, 1, 30, 30)
    torch.testing.assert_close(part(q, k, k, bias=zero), expected)
    torch.testing.assert_close(part(q, k, k, mask=masks.Causal()), part(q, k, k, causal=True))


@pytest.mark.parametrize("options", [{"score": "cosine"}, {"bias": {"kind": "t5"}}, {"bias": {"kind": "alibi", "learned": True}}])
def test_the_exact_part_learns_what_it_holds(options: dict[str, object]) -> None:
    part = ExactAttentionOptions.model_validate(options | {"heads": 2}).build()
    q = torch.randn(1, 2, 20, 8)
    part(q, q, q.flip(2), mask=masks.Lambda(5, 2)).square().sum().backward()
    (parameter,) = part.parameters()
    assert parameter.grad is not None
    assert parameter.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="how many heads"):
        ExactAttentionOptions.model_validate(options)


def test_the_exact_part_drops_in_training_alone() -> None:
    part = ExactAttentionOptions(dropout=0.5).build()
    q = torch.randn(1, 2, 20, 8)
    assert not torch.equal(part(q, q, q), part(q, q, q))
    part.eval()
    torch.testing.assert_close(part(q, q, q), ops.attention(q, q, q))
