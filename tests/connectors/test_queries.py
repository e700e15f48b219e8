"""Q-Former and resampler against the published modules, and what learned queries promise."""

from __future__ import annotations

import pytest
import torch
from transformers import Blip2QFormerConfig, Blip2QFormerModel, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from tests.connectors.kinds import made, tokens
from vlm.connectors import QFormerOptions, ResamplerOptions

QUERIES = ["qformer", "qformer-pre", "resampler", "resampler-apart"]


def give(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("every", [1, 2])
def test_mblip_qformer_equals_the_published_one(every):
    torch.manual_seed(0)
    theirs = Blip2QFormerModel(
        Blip2QFormerConfig(
            hidden_size=12, num_hidden_layers=3, num_attention_heads=3, intermediate_size=20, encoder_hidden_size=7,
            cross_attention_frequency=every, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            initializer_range=0.5, attn_implementation="eager",
        )
    ).eval()
    options = QFormerOptions(queries=5, width=12, depth=3, heads=3, ffn_width=20, cross_every=every, norm_eps=1e-12)
    ours = options.build(7, 12, None).eval()
    assert sum(p.numel() for p in ours.layers.parameters()) + sum(p.numel() for p in ours.norm.parameters()) == sum(
        p.numel() for p in theirs.parameters()
    )
    give(ours.norm, theirs.layernorm)
    for layer, source in zip(ours.layers, theirs.encoder.layer, strict=True):
        assert (layer.cross is not None) is hasattr(source, "crossattention")
        pairs = [(layer.attention, layer.norm1, source.attention)]
        if layer.cross is not None:
            pairs.append((layer.cross, layer.norm2, source.crossattention))
        for attention, norm, published in pairs:
            give(attention.q, published.attention.query)
            give(attention.k, published.attention.key)
            give(attention.v, published.attention.value)
            give(attention.out, published.output.dense)
            give(norm, published.output.LayerNorm)
        give(layer.ffn.up, source.intermediate_query.dense)
        give(layer.ffn.down, source.output_query.dense)
        give(layer.norm3, source.output_query.LayerNorm)
    with torch.no_grad():
        ours.projection.weight.copy_(torch.eye(12))
        ours.projection.bias.zero_()
        x, mask = tokens(4, count=9), torch.rand(4, 9) > 0.4
        mask[:, 0] = True
        for given in (None, mask):
            wanted = theirs(
                query_embeds=ours.queries[None].expand(4, -1, -1),
                encoder_hidden_states=x,
                encoder_attention_mask=None if given is None else given.long(),
            ).last_hidden_state
            torch.testing.assert_close(ours(x, given)[0], wanted, rtol=1e-4, atol=1e-5)


def test_cosmo_resampler_equals_the_published_one():
    torch.manual_seed(0)
    config = IdeficsConfig(
        vision_config={"embed_dim": 8}, perceiver_config={"qk_layer_norms_perceiver": False, "use_resampler": True}
    )
    theirs = IdeficsPerceiverResampler(config, 8, 3, 2, 5, 6).eval()
    ours = ResamplerOptions(latents=6, depth=3, heads=2, head_width=5).build(8, 8, None).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        ours.latents.copy_(theirs.latents)
        ours.projection.weight.copy_(torch.eye(8))
        ours.projection.bias.zero_()
    give(ours.norm, theirs.layer_norm)
    for layer, (attention, mlp) in zip(ours.layers, theirs.blocks, strict=True):
        give(layer.norm_tokens, attention.context_layer_norm)
        give(layer.norm_latents, attention.latents_layer_norm)
        give(layer.cross.q, attention.q_proj)
        give(layer.cross.k, attention.k_proj)
        give(layer.cross.v, attention.v_proj)
        give(layer.cross.out, attention.output_proj)
        give(layer.norm_ffn, mlp.ln)
        give(layer.ffn.up, mlp.fc)
        give(layer.ffn.down, mlp.c_proj)
        mlp.act = torch.nn.GELU()  # the published copy has ReLU here, cosmo GELU
    x = torch.randn(3, 11, 8)
    torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUERIES)
def test_the_order_of_visual_tokens_changes_nothing(name):
    module, x = made(name), tokens(3)
    mask, order = torch.rand(3, 24) > 0.3, torch.randperm(24)
    torch.testing.assert_close(module(x[:, order])[0], module(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module(x[:, order], mask[:, order])[0], module(x, mask)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUERIES)
def test_padding_changes_nothing(name):
    module, x = made(name), tokens(3, count=5)
    padded, mask = torch.cat([x, torch.full((3, 4, 7), torch.nan)], 1), torch.arange(9).expand(3, 9) < 5
    torch.testing.assert_close(module(padded, mask)[0], module(x)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", QUERIES)
def test_no_tokens_give_zero_and_no_nan(name):
    module = made(name)
    out, kept = module(torch.full((2, 24, 7), torch.nan), torch.zeros(2, 24, dtype=torch.bool))
    assert (out == 0).all()
    assert not kept.any()
    out, kept = module(torch.zeros(2, 0, 7), torch.zeros(2, 0, dtype=torch.bool))
    assert (out == 0).all()
    assert not kept.any()


@pytest.mark.parametrize("name", ["qformer", "resampler", "resampler-apart"])
def test_every_position_reads_the_tokens_and_differs(name):
    module, x = made(name), tokens(1)
    moved = x.clone()
    moved[0, 17] += torch.linspace(-1, 1, 7)  # not the same in all channels: a layer norm takes that away
    assert ((module(moved)[0] - module(x)[0]).abs().amax(-1) > 1e-6).all()
    out = module(x)[0][0]
    assert torch.pdist(out).min() > 1e-3


def test_qformer_counts_its_parameters():
    c, d_v, d, f, k = 12, 7, 10, 20, 5
    module = QFormerOptions(queries=k, width=c, depth=3, heads=3, ffn_width=f, cross_every=2).build(d_v, d, None)
    layer = 4 * (c * c + c) + 2 * c + (c * f + f) + (f * c + c) + 2 * c
    cross = 2 * (c * c + c) + 2 * (d_v * c + c) + 2 * c
    assert sum(p.numel() for p in module.parameters()) == k * c + 2 * c + 3 * layer + 2 * cross + c * d + d


def test_resampler_counts_its_parameters():
    c, d, k = 8, 10, 6
    module = ResamplerOptions(latents=k, depth=3, heads=2).build(c, d, None)
    layer = 3 * 2 * c + 4 * c * c + 2 * 4 * c * c
    assert sum(p.numel() for p in module.parameters()) == k * c + 3 * layer + 2 * c + c * d + d


def test_mblip_another_language_model_changes_the_projection_alone():
    options = QFormerOptions(queries=5, width=12, heads=3)
    shapes = [{n: p.shape for n, p in options.build(7, d, None).named_parameters()} for d in (10, 24)]
    assert {name for name in shapes[0] if shapes[0][name] != shapes[1][name]} == {"projection.weight", "projection.bias"}
