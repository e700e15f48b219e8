"""The parts of the linear-decay mixer: slopes, positions, norm, and the layer against a plain loop over its formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlm.attention.linear_decay import LinearDecayOptions, layer_factor, positions_inside, slopes_of
from vlm.attention.mixer import MixerShape, Places, SimpleRmsNorm


def shape(layer=0, heads=2, depth=3):
    return MixerShape(width=8, heads=heads, kv_heads=heads, head_width=4, layer=layer, depth=depth, norm_eps=1e-6)


def test_core_transnormer_lrpe_is_the_cosine_of_the_distance():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 3, 9, 4, dtype=torch.float64)
    theta = torch.rand(3, 4, dtype=torch.float64)
    position = torch.arange(9)[None] + 5
    got = positions_inside(q, position, theta) @ positions_inside(k, position, theta).mT
    lag = position[0][:, None] - position[0][None]
    angle = lag[None, :, :, None] * theta[:, None, None]
    expected = (q[0][:, :, None] * k[0][:, None] * angle.cos()).sum(-1)
    assert torch.allclose(got[0], expected, atol=1e-5)  # angles are float32


def test_core_transnormer_only_the_first_layer_has_lrpe_unless_told():
    assert [layer for layer in range(3) if any("theta" in name for name, _ in LinearDecayOptions().build(shape(layer)).named_parameters())] == [0]


def test_core_transnormer_lrpe_starts_over_all_channels_of_the_heads():
    """10000^(-2 r / C) with r over all C = H d of them, whatever the width of the model."""
    for width in (8, 24):
        theta = LinearDecayOptions().build(MixerShape(width=width, heads=2, kv_heads=2, head_width=4, layer=0, depth=3, norm_eps=1e-6)).theta
        assert torch.allclose(theta.flatten(), 10000.0 ** (-2 * torch.arange(8) / 8))


def test_slopes_of_both_kinds():
    assert slopes_of("alibi", 4) == [0.25, 0.0625, 0.015625, 0.00390625]
    assert slopes_of("alibi", 3) == pytest.approx([2**-4, 2**-8, 2**-2])
    assert slopes_of("exp8", 4) == [2.0, 4.0, 6.0, 8.0]
    assert slopes_of("none", 2) == [0.0, 0.0]
    assert layer_factor("alibi", 0, 4) == pytest.approx(1 + 1e-5)
    assert layer_factor("alibi", 3, 4) == pytest.approx(1e-5)
    assert layer_factor("exp8", 3, 4) == 0.25
    assert layer_factor("alibi", 0, 1) == 1.0


def test_decay_is_never_growth_whatever_is_learned():
    layer = LinearDecayOptions(learned=True).build(shape())
    fixed = LinearDecayOptions().build(shape())
    assert torch.allclose(layer.log_decay(), fixed.log_decay())
    with torch.no_grad():
        layer.log_slopes.fill_(9.0)
    assert (layer.log_decay() < 0).all()


def test_the_norm_has_no_weights_and_unit_mean_square():
    x = torch.randn(3, 7, 16) * 5
    norm = SimpleRmsNorm(1e-6)
    assert not list(norm.parameters())
    assert torch.allclose(norm(x).square().mean(-1), torch.ones(3, 7), atol=1e-5)


@torch.no_grad()
def test_the_layer_is_its_formulas():
    torch.manual_seed(0)
    layer = LinearDecayOptions().build(shape(layer=1))  # without LRPE
    x = torch.randn(1, 6, 8)
    got, (state,) = layer(x, Places(torch.arange(6)[None]), None)
    q, k, v = F.silu(layer.q(x))[0], F.silu(layer.k(x))[0], layer.v(x)[0]
    out = torch.zeros(6, 8)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        decay = math.exp(-slopes_of("alibi", 2)[head] * (1 - 1 / 2 + 1e-5))
        for i in range(6):
            for j in range(i + 1):
                out[i, part] += decay ** (i - j) * (q[i, part] @ k[j, part]) * v[j, part]
    normed = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(got[0], layer.out(layer.gate(x)[0] * normed), atol=1e-5)
    assert state.shape == (1, 2, 4, 4)
