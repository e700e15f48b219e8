"""What holds for every connector: shapes, masks, gradients, mixed precision, refusals."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from tests.connectors.kinds import ADAPTER, GRID, KINDS, WIDTH_IN, WIDTH_OUT, K, N, made, tokens
from vlm.config.errors import RequestError

every = pytest.mark.parametrize("name", KINDS)


def ragged(n: int) -> torch.Tensor:
    """Masks [n, N] with 0, 1, some and all valid tokens in turn."""
    mask = torch.rand(n, N, generator=torch.Generator().manual_seed(3)) > 0.5
    mask[0], mask[1], mask[2] = False, False, True
    mask[1, 13] = True
    return mask


@every
@pytest.mark.parametrize("n", [0, 1, 3])
def test_shapes_are_as_counted(name, n):
    module = made(name)
    assert module.count(N) == K[name]
    out, mask = module(tokens(n))
    assert out.shape == (n, K[name], WIDTH_OUT)
    assert mask is None
    out, mask = module(tokens(n), torch.ones(n, N, dtype=torch.bool))
    assert out.shape == (n, K[name], WIDTH_OUT)
    assert mask is not None
    assert mask.shape == (n, K[name])
    assert mask.dtype == torch.bool


@every
def test_an_all_valid_mask_changes_nothing(name):
    module, x = made(name), tokens(3)
    out, mask = module(x, torch.ones(3, N, dtype=torch.bool))
    assert mask.all()
    torch.testing.assert_close(out, module(x)[0], rtol=1e-5, atol=1e-6)


@every
def test_what_masked_tokens_hold_is_never_read(name):
    module, mask = made(name), ragged(5)
    one, other = tokens(5, seed=1), tokens(5, seed=1)
    one[~mask] = torch.nan
    other[~mask] = 1e4
    out, kept = module(one, mask)
    assert torch.equal(out, module(other, mask)[0])
    assert torch.isfinite(out).all()
    assert (out[~kept] == 0).all()
    assert not kept[0].any()
    assert kept[2].all()
    assert (out[kept] != 0).any()
    one.requires_grad_()
    module(one, mask)[0].square().sum().backward()
    assert torch.isfinite(one.grad).all()
    assert (one.grad[~mask] == 0).all()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


@every
def test_rows_do_not_meet(name):
    module, mask, x = made(name), ragged(5), tokens(5)
    out, _ = module(x, mask)
    alone = torch.cat([module(x[i : i + 1], mask[i : i + 1])[0] for i in range(5)])
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-6)


@every
def test_no_rows_give_every_parameter_a_gradient_of_zero(name):
    module = made(name)
    for mask in (None, torch.ones(0, N, dtype=torch.bool)):
        module.zero_grad()
        module(tokens(0), mask)[0].sum().backward()
        assert all(p.grad is not None and (p.grad == 0).all() for p in module.parameters())


@every
def test_gradients_in_float64(name):
    # The RMS norm computes in float32, which a float64 difference cannot check; it has no part of its own here.
    change = {"norm": "layernorm"} if KINDS[name].get("norm") == "rmsnorm" else {}
    module = made(name, **change).double()
    mask = ragged(3)
    x = tokens(3).double().requires_grad_()
    weight = torch.randn(3, K[name], WIDTH_OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    parameters = list(module.parameters())

    def loss(x, *_):
        return (module(x, mask)[0] * weight).sum()

    assert torch.autograd.gradcheck(loss, (x, *parameters), fast_mode=True)


@every
def test_autocast_stays_near_float32(name):
    module, x = made(name).train(), tokens(4)
    for part in module.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    expected, _ = module(x)
    for given in (x, x.bfloat16()):
        for mask in (None, ragged(4) | True):
            with torch.autocast("cpu", torch.bfloat16):
                out, _ = module(given, mask)
            assert (out.float() - expected).norm() < 0.03 * expected.norm()
    out.float().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


@every
def test_a_seed_gives_the_same_weights(name):
    one, other, third = (made(name, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert any(not torch.equal(value, third[key]) for key, value in one.items())


@every
def test_options_survive_json(name):
    options = ADAPTER.validate_python(KINDS[name])
    assert ADAPTER.validate_json(options.model_dump_json()) == options


@every
def test_shapes_that_do_not_fit_are_refused(name):
    module = made(name)
    with pytest.raises(ValueError, match=r"expected \[n, N, 7\]"):
        module(torch.zeros(2, N, WIDTH_IN + 1))
    with pytest.raises(ValueError, match=r"expected torch.bool \(2, 24\)"):
        module(tokens(2), torch.ones(2, N))
    with pytest.raises(ValueError, match="mask"):
        module(tokens(2), torch.ones(2, N + 1, dtype=torch.bool))


@pytest.mark.parametrize("name", ["linear", "mlp", "pool2d", "pixel-shuffle", "concat"])
def test_a_class_token_left_in_is_refused(name):
    module = made(name)
    for act in (lambda: module(tokens(2, count=N + 1)), lambda: module.count(N + 1)):
        with pytest.raises(RequestError, match=r"25 tokens.*4 x 6 = 24(.|\n)*class token"):
            act()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "mlp", "pre": {"kind": "pool2d", "grid": [3, 3]}}, "pool2d to 3 x 3 .* 4 x 6"),
        ({"kind": "mlp", "pre": {"kind": "pool2d", "grid": [4, 4]}}, "pool2d to 4 x 4 .* 4 x 6"),
        ({"kind": "mlp", "pre": {"kind": "pool2d", "grid": [8, 6]}}, "pool2d to 8 x 6 .* 4 x 6"),
        ({"kind": "mlp", "pre": {"kind": "pixel-shuffle", "factor": 4}}, "windows of 4 x 4 .* 4 x 6"),
        ({"kind": "mlp", "pre": {"kind": "concat", "k": 5}}, "concat of 5 .* 24"),
        ({"kind": "qformer", "width": 9, "heads": 2}, "2 heads .* 9"),
        ({"kind": "resampler", "heads": 2}, "2 heads .* 7"),
    ],
)
def test_numbers_that_do_not_divide_are_named_when_built(change, named):
    with pytest.raises(RequestError, match=named):
        ADAPTER.validate_python(change).build(WIDTH_IN, WIDTH_OUT, GRID)


@pytest.mark.parametrize("pre", [{"kind": "pool2d", "grid": [2, 2]}, {"kind": "pixel-shuffle"}])
def test_a_step_on_a_grid_needs_one(pre):
    with pytest.raises(RequestError, match="needs tokens on a grid"):
        ADAPTER.validate_python({"kind": "mlp", "pre": pre}).build(WIDTH_IN, WIDTH_OUT, None)


def test_without_a_grid_any_number_of_tokens_is_taken():
    for name in ("linear", "linear-k", "mlp", "concat", "qformer", "resampler"):
        module = ADAPTER.validate_python(KINDS[name]).build(WIDTH_IN, WIDTH_OUT, None)
        for count in (3, 9, 27):
            assert module(tokens(2, count=count))[0].shape == (2, module.count(count), WIDTH_OUT)
    module = ADAPTER.validate_python(KINDS["concat"]).build(WIDTH_IN, WIDTH_OUT, None)
    with pytest.raises(RequestError, match="concat of 3 .* 10 tokens"):
        module(tokens(2, count=10))


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "nothing"},
        {"kind": "linear", "tokens": 0},
        {"kind": "linear", "tokens": "pooled"},
        {"kind": "linear", "dropout": 1.0},
        {"kind": "mlp", "depth": 0},
        {"kind": "mlp", "pre": {"kind": "pool2d", "grid": [0, 1]}},
        {"kind": "mlp", "pre": {"kind": "pool2d", "grid": [1]}},
        {"kind": "mlp", "queries": 3},
        {"kind": "qformer", "cross_every": 3},
        {"kind": "resampler", "latents": 0},
    ],
)
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValidationError):
        ADAPTER.validate_python(wrong)
