"""Exact attention: the native kernel and the twin against a float64 oracle written here from the definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.ops.attention_native import native_attention


def tensors(b: int, h: int, g: int, n: int, m: int, d: int, v: int) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64) for s in ((b, h, n, d), (b, g, m, d), (b, g, m, v))]


def definition(q: Tensor, k: Tensor, v: Tensor, allow: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row by row, in float64, with Python's own exp and log: nothing shared with the code under test."""
    b, h, n, d = q.shape
    group = h // k.shape[1]
    out, lse = torch.zeros(b, h, n, v.shape[3], dtype=torch.float64), torch.full((b, h, n), -math.inf, dtype=torch.float64)
    for ib, ih, i in itertools.product(range(b), range(h), range(n)):
        keys = [j for j in range(k.shape[2]) if allow[ib, ih, i, j]]
        if not keys:
            continue
        s = [float(q[ib, ih, i] @ k[ib, ih // group, j]) / math.sqrt(d) + (float(bias[ib, ih, i, j]) if bias is not None else 0.0)
             for j in keys]
        top = max(s)
        weights = [math.exp(x - top) for x in s]
        lse[ib, ih, i] = top + math.log(sum(weights))
        for j, w in zip(keys, weights):
            out[ib, ih, i] += w / sum(weights) * v[ib, ih // group, j]
    return out, lse


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("causal", [False, True])
def test_core_exact_attention_follows_the_definition_on_both_backends(backend: ops.Backend, causal: bool) -> None:
    q, k, v = tensors(2, 4, 2, 5, 7, 6, 3)
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0] * 7], dtype=torch.bool)
    bias = torch.randn(2, 1, 5, 7, dtype=torch.float64)
    bias[0, 0, 2, 4] = -math.inf
    allow = mask[:, None, None, :].expand(2, 4, 5, 7).clone()
    if causal:
        allow &= torch.ones(5, 7, dtype=torch.bool).tril(2)
    allow &= bias != -math.inf
    out, lse = definition(q, k, v, allow, bias.expand(2, 4, 5, 7))
    with ops.backend(backend):
        got, got_lse = ops.attention(q.float(), k.float(), v.float(), causal=causal, key_mask=mask, bias=bias.float(),
                                     return_lse=True)
    assert error(got, out) < 1e-6
    assert error(got_lse, lse) < 1e-6


SHAPES = [
    (1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 0, 3, 4, 4), (2, 2, 1, 3, 0, 4, 4), (0, 2, 1, 3, 3, 4, 4), (1, 2, 2, 13, 31, 8, 16),
    (1, 2, 2, 14, 32, 16, 17), (1, 2, 2, 15, 33, 33, 8), (1, 2, 2, 55, 255, 16, 16), (1, 4, 2, 57, 257, 16, 16),
    (1, 2, 1, 113, 521, 24, 40), (1, 16, 16, 61, 67, 8, 8), (2, 2, 2, 70, 30, 8, 8),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_values_and_gradients_match_float64(shape: tuple[int, ...], level: str) -> None:
    b, h, _, n, m, _, _ = shape
    inputs = tensors(*shape)
    mask = torch.rand(b, m) < 0.7
    for causal, use_mask, bias_shape in [(False, False, None), (True, False, (1, h, n, m)), (False, True, (b, 1, 1, m)),
                                         (True, True, (1, 1, n, m)), (True, True, (b, h, n, 1))]:
        bias = [] if bias_shape is None else [torch.randn(bias_shape, dtype=torch.float64)]

        def call(q: Tensor, k: Tensor, v: Tensor, *bias: Tensor, causal=causal, use_mask=use_mask) -> tuple[Tensor, Tensor]:
            return ops.attention(q, k, v, causal=causal, key_mask=mask if use_mask else None,
                                 bias=bias[0] if bias else None, return_lse=True)

        worst = max(errors(call, [*inputs, *bias]))
        assert worst < 1e-5, (causal, use_mask, bias_shape)


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    inputs = tensors(2, 4, 4, 200, 300, 64, 64)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v, causal=True),)

    for mine, theirs in zip(errors(ours, inputs), errors(ours, inputs, "torch")):
        assert mine <= 2 * theirs + 1e-7


def test_core_exact_attention_alignment_only_matters_when_lengths_differ() -> None:
    q, k, v = (t.float() for t in tensors(1, 1, 1, 4, 9, 8, 8))
    with ops.backend("native"):
        top = ops.attention(q, k, v, causal=True, alignment="top-left")
        bottom = ops.attention(q, k, v, causal=True)
        last = ops.attention(q[:, :, 3:], k, v)
    torch.testing.assert_close(top, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(bottom[:, :, 3:], last)  # the last query sees every key
    assert not torch.allclose(top, bottom)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_exact_attention_empty_rows_are_zero_with_zero_gradients(backend: ops.Backend) -> None:
    inputs = tensors(2, 2, 2, 6, 4, 8, 8)
    mask = torch.tensor([[True] * 4, [False] * 4])

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, causal=True, key_mask=mask, return_lse=True)

    out, lse, dq, dk, dv = run(call, inputs, backend, torch.float32)
    assert (out[1] == 0).all()
    assert (out[0, :, :2] == 0).all()  # bottom-right with 6 queries and 4 keys: the first two see nothing
    assert (lse[1] == -math.inf).all()
    for gradient in (dq[1], dk[1], dv[1], dq[0, :, :2]):
        assert (gradient == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_garbage_in_masked_keys_does_not_leak(backend: ops.Backend, level: str) -> None:
    q, k, v = tensors(1, 2, 2, 20, 70, 8, 8)
    mask = torch.rand(1, 70) < 0.5
    clean = [q, torch.where(mask[:, None, :, None], k, 0.0), torch.where(mask[:, None, :, None], v, 0.0)]
    dirty = [q, torch.where(mask[:, None, :, None], k, math.nan), torch.where(mask[:, None, :, None], v, math.inf)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v, key_mask=mask, causal=True),)

    for a, b in zip(run(call, clean, backend, torch.float32), run(call, dirty, backend, torch.float32)):
        assert torch.equal(a, b)


def test_any_strides_give_the_same_bits() -> None:
    fused = torch.randn(2, 37, 3, 4, 16)  # one projection: [B, N, qkv, H, D]
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    bias = torch.randn(1, 4, 1, 1).expand(2, 4, 37, 37)
    with ops.backend("native"):
        expected = ops.attention(q.contiguous(), k.contiguous(), v.contiguous(), bias=bias.contiguous())
        assert torch.equal(ops.attention(q, k, v, bias=bias), expected)
        assert torch.equal(ops.attention(q.mT.contiguous().mT, k, v, bias=bias), expected)


@pytest.mark.parametrize("shape", [(3, 2, 2, 57, 300, 16, 16), (1, 1, 1, 130, 1100, 8, 8), (2, 8, 4, 90, 90, 16, 16)], ids=str)
def test_core_exact_attention_bits_do_not_depend_on_the_thread_count(shape: tuple[int, ...], level: str) -> None:
    b, h, _, n, m, _, _ = shape
    inputs = [*tensors(*shape), torch.randn(1, h, n, m)]
    mask = torch.rand(b, m) < 0.8

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, causal=True, key_mask=mask, bias=bias, return_lse=True)

    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(call, inputs, "native", torch.float32))
    for other in results[1:]:
        for a, b_ in zip(results[0], other):
            assert torch.equal(a, b_)


def test_core_exact_attention_query_groups_equal_repeated_keys() -> None:
    q, k, v = (t.float() for t in tensors(2, 6, 2, 20, 30, 8, 8))
    with ops.backend("native"):
        grouped = ops.attention(q, k, v)
        repeated = ops.attention(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1))
    assert torch.equal(grouped, repeated)


def test_core_exact_attention_partial_results_merge_by_their_lse() -> None:
    """Split the keys in two, merge with the formula of the book: the gradient of lse must be right, too."""
    inputs = tensors(1, 2, 2, 20, 50, 8, 8)

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        o1, l1 = ops.attention(q, k[:, :, :20], v[:, :, :20], return_lse=True)
        o2, l2 = ops.attention(q, k[:, :, 20:], v[:, :, 20:], return_lse=True)
        lse = torch.logaddexp(l1, l2)
        return ((l1 - lse).exp()[..., None] * o1 + (l2 - lse).exp()[..., None] * o2,)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v),)

    for a, b in zip(run(split, inputs, "native", torch.float32), run(whole, inputs, "torch", torch.float64)):
        assert error(a, b) < 1e-5


@given(b=st.integers(1, 2), g=st.integers(1, 2), r=st.integers(1, 3), n=st.integers(0, 40), m=st.integers(0, 300),
       d=st.integers(1, 40), v=st.integers(1, 40), causal=st.booleans(), top=st.booleans(), lengths=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_shapes(b: int, g: int, r: int, n: int, m: int, d: int, v: int, causal: bool, top: bool,
                       lengths: bool) -> None:
    mask = torch.randint(0, m + 1, (b,)) if lengths else torch.rand(b, m) < 0.5

    def call(q: Tensor, k: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, value, causal=causal, alignment="top-left" if top else "bottom-right",
                             key_mask=mask, return_lse=True)

    assert max(errors(call, tensors(b, g * r, g, n, m, d, v))) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_type_and_accuracy(dtype: torch.dtype) -> None:
    q, k, v = (t.to(dtype) for t in tensors(2, 2, 2, 40, 60, 16, 16))
    out = ops.attention(q, k, v)
    assert out.dtype == dtype
    exact = ops.attention(q.double(), k.double(), v.double())
    theirs = F.scaled_dot_product_attention(q, k, v)
    assert error(out, exact) <= 2 * error(theirs, exact)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_autocast_brings_mixed_types_together_as_torch_does(backend: ops.Backend) -> None:
    q, k, v = (t.float() for t in tensors(1, 2, 2, 8, 8, 16, 16))
    with pytest.raises(ValueError, match="share one floating type"):
        ops.attention(q, k, v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16), ops.backend(backend):
        out, lse = ops.attention(q, k, v.bfloat16(), return_lse=True)
        assert out.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        assert ops.attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype


def test_small_plain_problems_go_to_torch_and_others_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    native: list[tuple[int, ...]] = []

    def spy(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        native.append(tuple(q.shape))
        return native_attention(q, *rest)

    monkeypatch.setitem(ops.attention.__globals__, "native_attention", spy)  # the module is hidden by its function
    small, large = torch.randn(1, 2, 8, 16), torch.randn(2, 4, 128, 64)
    ops.attention(small, small, small, causal=True)
    ops.attention(large[:, :, :1], large, large, causal=True)  # decoding
    assert not native
    ops.attention(large, large, large)
    ops.attention(small, small, small, key_mask=torch.tensor([5]))
    assert native == [(2, 4, 128, 64), (1, 2, 8, 16)]


def test_float64_takes_the_twin_and_stays_float64() -> None:
    q, k, v = tensors(1, 1, 1, 8, 8, 8, 8)
    assert ops.attention(q, k, v).dtype == torch.float64
    with ops.backend("native"), pytest.raises(ValueError, match="float64"):
        ops.attention(q, k, v)


@pytest.mark.parametrize(("change", "message"), [
    ({"q": torch.zeros(2, 3, 4)}, "4 axes"),
    ({"k": torch.zeros(1, 2, 6, 5)}, "do not fit"),
    ({"q": torch.zeros(1, 3, 5, 8)}, "multiple"),
    ({"key_mask": torch.ones(1, 5, dtype=torch.bool)}, "key_mask must be bool"),
    ({"key_mask": torch.ones(1, 6)}, "key_mask must be bool"),
    ({"bias": torch.zeros(1, 2, 5, 5)}, "cannot be broadcast"),
    ({"bias": torch.zeros(1, 1, 1, 6, dtype=torch.bool)}, "must be floating"),
    ({"alignment": "left"}, "alignment"),
])
def test_wrong_arguments_are_named(change: dict[str, object], message: str) -> None:
    arguments = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 6, 8), "v": torch.zeros(1, 2, 6, 8)} | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        ops.attention(q, k, v, **arguments)  # type: ignore[arg-type]
