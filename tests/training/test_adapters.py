"""Low-rank adapters on layers whose weight is read by fused products, not called: they learn, and merge to what was learned."""

import copy

import pytest
import torch

from tests.training.test_engine import VOCABULARY, pairs
from vlm.models import LanguageOptions, VisionOptions
from vlm.models.swin import SwinOptions
from vlm.training.assembly import choose_trainable
from vlm.tuning import LoraOptions, TuningOptions, adapters_off, add_lora, merged_state
from vlm.types import VocabularyLayout


def language():
    shape = {"width": 16, "depth": 1, "heads": 2, "ffn_width": 24, "length": 9, "tie_embeddings": False}
    return LanguageOptions.model_validate(shape).build(VOCABULARY)


def swin():
    tower = SwinOptions(image_size=16, width=12, depths=(1, 1), heads=(2, 2), window=4, norm_zero_init=False)
    return VisionOptions(tower=tower).build(VocabularyLayout({}, {}))


def said(model, stream):
    output = model.encode(pairs(3), {stream: frozenset({"vocabulary" if stream == "text" else "embedding"})})[stream]
    return output.vocabulary.logits() if stream == "text" else output.embedding


@pytest.mark.parametrize(("make", "target", "stream"), [(language, "head", "text"), (swin, "*.qkv", "image")])
def test_an_adapter_of_a_weight_that_is_read_learns_and_merges(make, target, stream):
    torch.manual_seed(0)
    model = make()
    plain, before = copy.deepcopy(model), said(model, stream).detach()
    add_lora(model, LoraOptions(target=(target,), r=2))
    torch.testing.assert_close(said(model, stream), before)
    said(model, stream).square().sum().backward()
    adapters = {name: p for name, p in model.named_parameters() if ".lora_B." in name}
    assert adapters
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    with torch.no_grad():
        for p in adapters.values():
            p.normal_(std=0.3)
        learned = said(model, stream)
        assert not torch.allclose(learned, before, atol=1e-3)
        with adapters_off(model):
            torch.testing.assert_close(said(model, stream), before)
    plain.load_state_dict(merged_state(model))
    torch.testing.assert_close(said(plain, stream), learned, atol=1e-5, rtol=1e-5)


def test_freeze_spares_no_adapter_that_it_names():
    model = language()
    add_lora(model, LoraOptions(target=("*.attention.q", "head"), r=2))
    choose_trainable(model, TuningOptions(lora=LoraOptions(), freeze=("trunk.*",)))
    learns = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert learns
    assert all(name.startswith("head.lora_") for name in learns)
