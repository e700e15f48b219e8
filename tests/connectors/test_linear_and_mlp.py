"""The linear connector, the MLP and the steps before it: the exact checks of limber, infmllm and nvlm."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.connectors.kinds import made
from vlm.connectors import Connector, LinearOptions, MlpOptions
from vlm.connectors.gathering import ConcatOptions, PixelShuffleOptions, Pool2dOptions, shuffle


def pooled(grid: tuple[int, int], tower: tuple[int, int], seed: int = 0, **rest: object) -> Connector:
    torch.manual_seed(seed)
    return MlpOptions(pre=Pool2dOptions(grid=grid), **rest).build(6, 10, tower).eval()  # type: ignore[arg-type]


def plain(tower: tuple[int, int], seed: int = 0) -> Connector:
    torch.manual_seed(seed)
    return MlpOptions().build(6, 10, tower).eval()


def test_limber_counts_its_parameters():
    module = LinearOptions().build(7, 11, (2, 2))
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 7 * 11 + 11
    module = LinearOptions(tokens=4, bias=False).build(7, 11, None)
    assert sum(p.numel() for p in module.parameters() if p.requires_grad) == 4 * 7 * 11


def test_limber_is_deterministic_in_evaluation_and_drops_in_training():
    module, x = LinearOptions(dropout=0.5).build(7, 11, (2, 2)), torch.ones(3, 4, 7)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    torch.testing.assert_close(module(x)[0], x @ module.projection.weight.T + module.projection.bias)


def test_limber_solves_planted_features():
    """Features that are a linear map of the wanted embeddings are mapped back to a gap near zero."""
    torch.manual_seed(0)
    wanted, planted = torch.randn(64, 1, 5), torch.randn(5, 8)
    module = LinearOptions(dropout=0).build(8, 5, (1, 1))
    features = wanted @ planted
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def gap() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (module(features)[0] - wanted).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(gap) > 0.1
    assert gap() < 1e-6


def test_limber_k_tokens_are_one_vector_cut_in_k():
    module, x = LinearOptions(tokens=3).build(7, 11, None).eval(), torch.randn(2, 1, 7)
    made_from_one = (x[:, 0] @ module.projection.weight.T + module.projection.bias).reshape(2, 3, 11)
    torch.testing.assert_close(module(x)[0], made_from_one)
    several, mask = torch.randn(2, 5, 7), torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool)
    means = torch.stack([several[0, [0, 1, 3]].mean(0), several[1, 4]])[:, None]
    torch.testing.assert_close(module(several, mask)[0], module(means)[0])


@pytest.mark.parametrize(("depth", "hidden", "parameters"), [(1, None, 6 * 10 + 10), (2, 13, 6 * 13 + 13 + 13 * 10 + 10),
                                                             (3, None, 6 * 10 + 10 + 2 * (100 + 10))])  # fmt: skip
def test_mlp_counts_its_parameters(depth, hidden, parameters):
    module = MlpOptions(depth=depth, hidden=hidden).build(6, 10, (2, 2))
    assert sum(p.numel() for p in module.parameters()) == parameters


def test_mlp_is_its_layers_by_hand():
    module, x = MlpOptions(depth=3, norm="layernorm", norm_at="output").build(6, 10, (2, 2)), torch.randn(2, 4, 6)
    first, second, third = module.linears
    by_hand = module.norm(third(F.gelu(second(F.gelu(first(x))))))
    assert torch.equal(module(x)[0], by_hand)


@pytest.mark.parametrize("where", ["tokens", "input"])
def test_the_norm_stands_where_it_is_said(where):
    module = MlpOptions(depth=1, norm="layernorm", norm_at=where, pre=ConcatOptions(k=2)).build(6, 10, (2, 2))
    x = torch.randn(3, 4, 6)
    normed = F.layer_norm(x, [6]).reshape(3, 2, 12) if where == "tokens" else F.layer_norm(x.reshape(3, 2, 12), [12])
    torch.testing.assert_close(module(x)[0], module.linears[0](normed))


def test_infmllm_with_the_whole_grid_equals_the_plain_mlp():
    x = torch.randn(3, 30, 6)
    assert torch.equal(pooled((5, 6), (5, 6))(x)[0], plain((5, 6))(x)[0])


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_infmllm_equals_avg_pool2d(h, w, down, across, n):
    tower = (h * down, w * across)
    x = torch.randn(n, tower[0] * tower[1], 6, generator=torch.Generator().manual_seed(h + 7 * w))
    averaged = F.avg_pool2d(x.reshape(n, *tower, 6).permute(0, 3, 1, 2), (down, across)).flatten(2).transpose(1, 2)
    expected = plain((h, w))(averaged)[0]
    torch.testing.assert_close(pooled((h, w), tower)(x)[0], expected)


def test_infmllm_a_position_depends_on_its_own_window_alone():
    module, x = pooled((2, 3), (4, 6)), torch.randn(1, 24, 6)
    out = module(x)[0]
    for row in range(4):
        for column in range(6):
            moved = x.clone()
            moved[0, row * 6 + column] += 1
            changed = (module(moved)[0] != out).any(-1)[0].nonzero().flatten().tolist()
            assert changed == [(row // 2) * 3 + column // 2]


def test_infmllm_a_constant_map_gives_equal_tokens():
    out = pooled((2, 3), (4, 6))(torch.randn(2, 1, 6).expand(2, 24, 6))[0]
    torch.testing.assert_close(out, out[:, :1].expand_as(out), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(out[0], out[1], atol=1e-2)


def test_infmllm_pools_before_the_mlp():
    module, x = pooled((1, 1), (2, 2)), torch.randn(2, 4, 6)
    assert not torch.allclose(module(x)[0], plain((2, 2))(x)[0].mean(1, keepdim=True), atol=1e-4)


@pytest.mark.parametrize("norm_at", ["tokens", "input"])
def test_a_pool_averages_the_valid_tokens(norm_at):
    module = pooled((2, 3), (4, 6), norm="layernorm", norm_at=norm_at)
    with torch.no_grad():
        module.norm.bias.add_(1.0)
    x, mask = torch.randn(4, 24, 6), torch.rand(4, 24) > 0.6
    mask[0] = False
    out, kept = module(x, mask)
    for n in range(4):
        for k in range(6):
            cells = [r * 6 + c for r in range(4) for c in range(6) if (r // 2, c // 2) == (k // 3, k % 3) and mask[n, r * 6 + c]]
            assert bool(kept[n, k]) is bool(cells)
            if cells:
                seen = module.norm(x[n, cells]).mean(0) if norm_at == "tokens" else module.norm(x[n, cells].mean(0))
                torch.testing.assert_close(out[n, k], module.linears[1](F.gelu(module.linears[0](seen))))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_nvlm_shuffle_takes_every_pixel_once(h, w, factor, channels, n):
    grid = (h * factor, w * factor)
    x = torch.randn(n, grid[0] * grid[1], channels)
    joined = shuffle(x, grid, factor)
    assert joined.shape == (n, h * w, factor**2 * channels)
    back = joined.reshape(n, h, w, factor, factor, channels).permute(0, 1, 3, 2, 4, 5).reshape(x.shape)
    assert torch.equal(back, x)


def test_nvlm_shuffle_joins_rows_then_columns():
    numbered = torch.arange(24).reshape(1, 24, 1)
    joined = shuffle(numbered, (4, 6), 2)[0].tolist()
    assert joined == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11], [12, 13, 18, 19], [14, 15, 20, 21], [16, 17, 22, 23]]


def test_nvlm_shuffle_equals_the_published_views_and_permutes():
    """The two views and permutations of the InternVL code (its second version), which NVLM's encoder follows."""
    x = torch.randn(2, 8, 8, 3)
    y = x.view(2, 8, 4, 6).permute(0, 2, 1, 3).contiguous()
    y = y.view(2, 4, 4, 12).permute(0, 2, 1, 3).contiguous()
    assert torch.equal(shuffle(x.reshape(2, 64, 3), (8, 8), 2), y.reshape(2, 16, 12))


def test_nvlm_pixel_shuffle_mlp_has_a_quarter_of_the_tokens():
    module = MlpOptions(pre=PixelShuffleOptions(), hidden=20).build(6, 10, (32, 32))
    assert module.count(1024) == 256
    assert module.linears[0].weight.shape == (20, 24)


@pytest.mark.parametrize("name", ["pixel-shuffle", "concat"])
def test_a_joined_position_is_valid_where_any_of_its_tokens_is(name):
    module, mask = made(name), torch.zeros(24, 24, dtype=torch.bool)
    mask.fill_diagonal_(True)
    _, kept = module(torch.randn(24, 24, 7), mask)
    assert (kept.sum(1) == 1).all()
    expected = [(i // 12) * 3 + (i % 6) // 2 if name == "pixel-shuffle" else i // 3 for i in range(24)]
    assert kept.int().argmax(1).tolist() == expected
