"""Merging attention results over disjoint keys: equal to attention over all keys, gradients included."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.ops.merge_native import native_merge


def parts(p: int, b: int, h: int, n: int, v: int) -> list[Tensor]:
    outs, lses = torch.randn(p, b, h, n, v, dtype=torch.float64), 3 * torch.randn(p, b, h, n, dtype=torch.float64)
    return [*outs, *lses]


def merge(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    half = len(tensors) // 2
    return ops.merge_attention(*zip(tensors[:half], tensors[half:]))


SHAPES = [(1, 1, 1, 1, 1), (2, 2, 3, 5, 17), (3, 0, 2, 3, 4), (3, 1, 2, 0, 4), (2, 1, 2, 3, 0), (5, 2, 2, 131, 16), (2, 1, 3, 257, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_values_and_gradients_match_float64(shape: tuple[int, ...], level: str) -> None:
    assert max(errors(merge, parts(*shape))) < 1e-5


def test_twin_passes_gradcheck() -> None:
    with ops.backend("torch"):
        assert torch.autograd.gradcheck(merge, [t.requires_grad_() for t in parts(3, 1, 2, 3, 4)])


@given(m=st.integers(0, 90), cuts=st.lists(st.integers(0, 90), max_size=4), causal=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_core_exact_attention_any_split_of_the_keys_merges_to_the_whole(m: int, cuts: list[int], causal: bool, seed: int) -> None:
    """Causal splits keep absolute positions through a bias that removes pairs: some parts have empty rows, or no keys."""
    torch.manual_seed(seed)
    n = 21
    inputs = [torch.randn(s, dtype=torch.float64) for s in ((2, 4, n, 8), (2, 2, m, 8), (2, 2, m, 5))]
    edges = [0, *sorted(min(c, m) for c in cuts), m]
    mask = torch.rand(2, m) < 0.7
    removed = torch.zeros(1, 1, n, m)
    if causal:
        removed[0, 0] = torch.where(torch.ones(n, m, dtype=torch.bool).tril(m - n), 0.0, -math.inf)

    def split(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]
        return ops.merge_attention(*(ops.attention(q, k[:, :, s], v[:, :, s], key_mask=mask[:, s], return_lse=True,
                                                   bias=removed[..., s].to(q.dtype)) for s in pieces))

    def whole(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, causal=causal, key_mask=mask, return_lse=True)

    expected = run(whole, inputs, "torch", torch.float64)
    for a, b in zip(run(split, inputs, "native", torch.float32), expected):
        assert error(a, b) < 1e-5
    for a, b in zip(run(split, inputs, "torch", torch.float64), expected):
        assert error(a, b) < 1e-10


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_empty_parts_are_not_read_and_get_no_gradient(backend: ops.Backend) -> None:
    tensors = parts(3, 1, 2, 4, 6)
    clean = [t.clone() for t in tensors]
    for t in (tensors, clean):
        t[3 + 1][0, 0] = -math.inf  # the second part has nothing for the first head
        for lse in t[3:]:
            lse[0, 1, 2] = -math.inf  # nobody has anything for this row
    tensors[1][0, 0] = math.nan
    results = [run(merge, t, backend, torch.float32) for t in (tensors, clean)]
    for a, b in zip(*results):
        assert torch.equal(a, b)
    out, lse, *gradients = results[0]
    assert (out[0, 1, 2] == 0).all()
    assert lse[0, 1, 2] == -math.inf
    assert all(g.isfinite().all() for g in gradients)
    assert (gradients[1][0, 0] == 0).all()
    assert (gradients[4][0, 0] == 0).all()
    assert all((g[0, 1, 2] == 0).all() for g in gradients)


def test_merging_is_associative_and_one_part_stays() -> None:
    a, b, c, la, lb, lc = (t.float() for t in parts(3, 2, 2, 9, 8))
    with ops.backend("native"):
        together = ops.merge_attention((a, la), (b, lb), (c, lc))
        left = ops.merge_attention(ops.merge_attention((a, la), (b, lb)), (c, lc))
        alone = ops.merge_attention((a, la))
    for x, y in zip(together, left):
        torch.testing.assert_close(x, y)
    assert torch.equal(alone[0], a)
    assert torch.equal(alone[1], la)


def test_far_apart_lse_do_not_overflow() -> None:
    out = torch.randn(1, 1, 2, 4)
    low, high = torch.full((1, 1, 2), -1e4), torch.full((1, 1, 2), 1e4)
    for backend in ("native", "torch"):
        with ops.backend(backend):
            merged, lse = ops.merge_attention((out * 7, low), (out, high))
        assert torch.equal(merged, out)
        assert torch.equal(lse, high)


def test_bits_do_not_depend_on_threads_or_strides(level: str) -> None:
    tensors = [t.float() for t in parts(3, 2, 4, 300, 24)]
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    results = []
    for threads, given_tensors in ((1, tensors), (2, spread), (7, tensors)):
        torch.set_num_threads(threads)
        results.append(run(merge, given_tensors, "native", torch.float32))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    tensors = parts(4, 2, 2, 100, 64)
    for mine, theirs in zip(errors(merge, tensors), errors(merge, tensors, "torch")):
        assert mine <= 2 * theirs + 1e-7


def test_half_precision_outs_keep_their_type() -> None:
    a, b, la, lb = parts(2, 1, 2, 9, 16)
    for backend in ("native", "torch"):
        with ops.backend(backend):
            out, lse = ops.merge_attention((a.bfloat16(), la.float()), (b.bfloat16(), lb.float()))
        assert out.dtype == torch.bfloat16
        assert lse.dtype == torch.float32
        assert error(out, ops.merge_attention((a, la), (b, lb))[0]) < 2e-2


def test_passes_opcheck_and_compiles_forward_and_backward() -> None:
    leaves = [t.float().requires_grad_() for t in parts(2, 1, 2, 5, 8)]
    torch.library.opcheck(native_merge, (leaves[:2], leaves[2:]))
    compiled = torch.compile(merge, fullgraph=True, backend="aot_eager")
    with ops.backend("native"):
        for a, b in zip(*(torch.autograd.grad(sum(t.square().sum() for t in f(*leaves)), leaves) for f in (compiled, merge))):
            torch.testing.assert_close(a, b)


class Merge(torch.nn.Module):
    def forward(self, a: Tensor, la: Tensor, b: Tensor, lb: Tensor) -> tuple[Tensor, Tensor]:
        return ops.merge_attention((a, la), (b, lb))


def test_the_twin_exports_and_runs_in_onnxruntime(onnx_run: Callable[..., list[Tensor]]) -> None:
    a, b, la, lb = (t.float() for t in parts(2, 2, 2, 6, 8))
    la[0, 0, 0] = lb[0, 0, 0] = la[1] = -math.inf
    expected = ops.merge_attention((a, la), (b, lb))
    program = torch.export.export(Merge(), (a, la, b, lb))
    for got in (program.module()(a, la, b, lb), onnx_run(Merge(), (a, la, b, lb))):
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("change", "message"), [
    ((), "at least one"), (((torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 3)),), "lse must be"),
    (((torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2)), (torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2))), "one shape"),
])
def test_bad_parts_are_refused(change: tuple[tuple[Tensor, Tensor], ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.merge_attention(*change)
