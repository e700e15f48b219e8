"""Token reduction: native kernels and twins against loops over tokens written here from the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.oracle import error, errors
from vlm import ops
from vlm.ops.tokens_native import (
    native_gather,
    native_match,
    native_merge_weights,
    native_scatter,
    native_select,
)

BACKENDS = ["native", "torch"]
ORDERS: list[ops.MatchOrder] = ["sources-first", "position", "similarity"]


def match_by_hand(metric: Tensor, r: int, protect: int, order: str) -> tuple[list[int], list[int], list[int], list[int]]:
    """metric [N, D] in float64 -> source, target, kept, assign, token by token."""
    n = len(metric)
    norms = metric.norm(dim=1)
    cosine = (metric @ metric.T / norms[:, None] / norms[None, :]).tolist()
    pairs = []
    for a in range(0, n, 2):
        if a < protect:
            continue
        cosines = [(cosine[a][b], -b) for b in range(1, n, 2) if b >= protect]
        value, goal = max(cosines, default=(-math.inf, 0))
        pairs.append((-value, a, -goal))
    pairs.sort()
    source, target = [a for _, a, _ in pairs[:r]], [b for _, _, b in pairs[:r]]
    stay = [i for i in range(n) if i not in source]
    if order == "sources-first":
        stay.sort(key=lambda i: (i % 2, i))
    if order == "similarity":
        falling = [a for _, a, _ in pairs]
        stay.sort(key=lambda i: (i % 2, i if i % 2 or i < protect else n + falling.index(i)))
    goal_of = dict(zip(source, target))
    return source, target, stay, [stay.index(goal_of.get(i, i)) for i in range(n)]


def separated(b: int, n: int, d: int) -> Tensor:
    return torch.randn(b, n, d, dtype=torch.float64)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 13, 31, 66, 113])
@pytest.mark.parametrize("protect", [0, 1, 2, 3])
def test_matching_follows_the_definition(n: int, protect: int, level: str) -> None:
    metric = separated(2, n, 16)
    most = max(n - protect, 0) // 2
    for order in ORDERS:
        for r in sorted({0, most // 2, most}):
            for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
                with ops.backend(backend):
                    got = ops.bipartite_match(metric.to(dtype), r, protect, order=order)
                for b in range(2):
                    expected = match_by_hand(metric[b], r, protect, order)
                    assert [t[b].tolist() for t in got] == list(expected), (order, r, backend)


def test_more_destinations_than_a_tile(level: str) -> None:
    near = torch.randperm(550)[torch.arange(1101) // 2 % 550]  # an even token is near one odd token
    metric = F.one_hot(near, 600).double() + 1e-2 * separated(1, 1101, 600)
    with ops.backend("native"):
        source, target, kept, _ = ops.bipartite_match(metric.float(), 550, 1)
    by_hand = match_by_hand(metric[0], 550, 1, "sources-first")
    assert dict(zip(source[0].tolist(), target[0].tolist())) == dict(zip(*by_hand[:2]))
    assert kept[0].tolist() == by_hand[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_tome_ties_go_to_the_lowest_index(backend: ops.Backend, level: str) -> None:
    metric = torch.randn(6, generator=torch.Generator().manual_seed(1)).expand(1, 601, 6)
    with ops.backend(backend):
        source, target, _, _ = ops.bipartite_match(metric, 40, 1)
    assert source[0].tolist() == list(range(2, 82, 2))
    assert (target == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_tome_nan_metric_merges_last_and_is_never_a_goal(backend: ops.Backend) -> None:
    metric = torch.randn(1, 41, 8)
    metric[0, [4, 9, 30]] = math.nan
    with ops.backend(backend):
        source, target, kept, assign = ops.bipartite_match(metric, 20, 1)
    assert source[0, -2:].tolist() == [4, 30]
    assert 9 not in target[0, :-2].tolist()
    assert sorted([*source[0].tolist(), *kept[0].tolist()]) == list(range(41))
    assert ((assign >= 0) & (assign < 21)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_are_averaged(backend: ops.Backend) -> None:
    keys = torch.randn(2, 4, 77, 16)
    with ops.backend(backend):
        for a, b in zip(ops.bipartite_match(keys, 20), ops.bipartite_match(keys.mean(1), 20)):
            assert torch.equal(a, b)
        spread = torch.randn(2, 77, 3, 4, 16)[:, :, 1].transpose(1, 2)  # from one fused projection
        for a, b in zip(ops.bipartite_match(spread, 20), ops.bipartite_match(spread.contiguous(), 20)):
            assert torch.equal(a, b)


# ---- merging


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weighting", ["size", "mean"])
def test_core_tome_r_0_is_identity(backend: ops.Backend, order: ops.MatchOrder, weighting: ops.MergeWeighting) -> None:
    x, sizes = torch.randn(2, 33, 20), torch.randint(1, 5, (2, 33)).float()
    with ops.backend(backend):
        matching = ops.bipartite_match(x, 0, order=order)
        merged, after = ops.merge_tokens(x, sizes, matching, weighting)
        assert torch.equal(ops.unmerge_tokens(merged, matching), x)
    assert torch.equal(merged, x.gather(1, matching.kept[..., None].expand_as(merged)))
    assert torch.equal(after, sizes.gather(1, matching.kept))
    if order == "position":
        assert torch.equal(merged, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_tome_conserves_the_weighted_sum_and_the_sizes(backend: ops.Backend) -> None:
    x, sizes = torch.randn(3, 197, 24), None
    total = x.sum(1)
    with ops.backend(backend):
        for _ in range(6):
            x, sizes = ops.merge_tokens(x, sizes, ops.bipartite_match(x, 16))
            torch.testing.assert_close((sizes[..., None] * x).sum(1), total, rtol=1e-4, atol=1e-4)
            assert (sizes.sum(1) == 197).all()
    assert x.shape == (3, 101, 24)


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_tome_merge_by_hand(backend: ops.Backend) -> None:
    x, sizes = torch.randn(2, 51, 7, dtype=torch.float64), torch.randint(1, 6, (2, 51)).double()
    matching = ops.bipartite_match(x, 20)
    for weighting in ("size", "mean"):
        with ops.backend(backend):
            merged, after = ops.merge_tokens(x.float(), sizes.float(), matching, weighting)
        for b in range(2):
            for slot in range(31):
                of = [i for i in range(51) if matching.assign[b, i] == slot]
                w = [float(sizes[b, i]) if weighting == "size" else 1.0 for i in of]
                assert error(merged[b, slot], sum(a * x[b, i] for a, i in zip(w, of)) / sum(w)) < 1e-5
                assert after[b, slot] == sum(float(sizes[b, i]) for i in of)


def test_core_tome_proportional_attention_equals_the_unmerged_duplicates() -> None:
    distinct = torch.randn(1, 20, 16)
    copies = distinct.repeat_interleave(2, 1)  # an even token and its odd twin
    matching = ops.bipartite_match(copies, 20, 0)
    assert torch.equal(matching.target.sort(1).values, matching.source.sort(1).values + 1)
    merged, sizes = ops.merge_tokens(copies, None, matching)
    merged, sizes = ops.merge_tokens(merged, sizes, ops.bipartite_match(merged, 0, 0))
    q = torch.randn(1, 1, 9, 16)
    with ops.backend("native"):
        got = ops.attention(q, merged[:, None], merged[:, None], bias=sizes.log()[:, None, None])
        torch.testing.assert_close(got, ops.attention(q, copies[:, None], copies[:, None]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_tome_unmerge_restores_equal_tokens_through_several_rounds(backend: ops.Backend) -> None:
    distinct = torch.randn(2, 8, 12)
    x = start = distinct.repeat_interleave(4, 1)
    with ops.backend(backend):
        assign = torch.arange(32).expand(2, -1)
        for r in (16, 8):
            matching = ops.bipartite_match(x, r, 0, order="position")
            x, _ = ops.merge_tokens(x, None, matching)
            assign = ops.compose_assignments(assign, matching.assign)
        assert x.shape[1] == 8
        torch.testing.assert_close(ops.unmerge_tokens(x, assign), start)


def test_aim_duplicates_merge_to_the_same_vector_and_sizes_do_not_count() -> None:
    x = torch.randn(1, 10, 6).repeat_interleave(2, 1)
    matching = ops.bipartite_match(x, 10, 0, order="similarity")
    merged, _ = ops.merge_tokens(x, torch.rand(1, 20) + 1, matching, "mean")
    assert torch.equal(merged, x[:, 1::2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_of_size_0_is_not_read_and_does_not_count(backend: ops.Backend) -> None:
    x, sizes = torch.randn(1, 9, 5), torch.ones(1, 9)
    matching = ops.bipartite_match(x, 3)
    loser = int(matching.source[0, 0])
    sizes[0, loser] = 0
    dirty = x.clone()
    dirty[0, loser] = math.nan
    with ops.backend(backend):
        merged, after = ops.merge_tokens(dirty, sizes, matching)
        expected, _ = ops.merge_tokens(torch.where(sizes[..., None] > 0, x, 0.0), sizes, matching)
    assert torch.equal(merged, expected)
    assert merged.isfinite().all()
    assert after.sum() == 8


@pytest.mark.parametrize("shape", [(1, 1, 1, 0), (2, 13, 5, 3), (2, 40, 17, 16), (3, 197, 33, 40), (1, 577, 64, 200), (2, 9, 0, 2)],
                         ids=str)
def test_merge_unmerge_and_gather_values_and_gradients_match_float64(shape: tuple[int, ...], level: str) -> None:
    b, n, c, r = shape
    x, sizes = torch.randn(b, n, c, dtype=torch.float64), torch.rand(b, n).double() + 0.5
    matching = ops.bipartite_match(torch.randn(b, n, 8), r)
    index = torch.randint(-1, n, (b, n + 3))

    def call(t: Tensor) -> tuple[Tensor, ...]:
        merged, after = ops.merge_tokens(t, sizes, matching)
        plain, _ = ops.merge_tokens(t, None, matching, "mean")
        return (merged, after, plain, ops.unmerge_tokens(merged, matching), ops.gather_tokens(t, index),
                ops.scatter_tokens(t, index[:, :n], n + 1))

    assert max(errors(call, [x])) < 1e-5


def test_core_tome_gradient_is_the_share_of_the_size() -> None:
    x = torch.randn(1, 7, 3, requires_grad=True)
    sizes = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7]])
    matching = ops.bipartite_match(x, 3)
    with ops.backend("native"):
        merged, after = ops.merge_tokens(x, sizes, matching)
    upstream = torch.randn_like(merged)
    (got,) = torch.autograd.grad(merged, x, upstream)
    assert not after.requires_grad
    for i in range(7):
        slot = matching.assign[0, i]
        torch.testing.assert_close(got[0, i], sizes[0, i] / after[0, slot] * upstream[0, slot])


def test_the_twins_pass_gradcheck_and_native_gradients_are_their_own_adjoints() -> None:
    x = torch.randn(1, 9, 3, dtype=torch.float64, requires_grad=True)
    matching, sizes = ops.bipartite_match(x, 3), torch.rand(1, 9).double()
    assert torch.autograd.gradcheck(lambda t: ops.unmerge_tokens(ops.merge_tokens(t, sizes, matching)[0], matching), [x])
    y = torch.randn(1, 9, 70, requires_grad=True)
    with ops.backend("native"):  # gather and scatter are each other's gradient, so a second one exists
        value = ops.merge_tokens(y, None, matching)[0].pow(3).sum()
        (first,) = torch.autograd.grad(value, y, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), y)
    with ops.backend("torch"):
        value = ops.merge_tokens(y, None, matching)[0].pow(3).sum()
        (first,) = torch.autograd.grad(value, y, create_graph=True)
        (expected,) = torch.autograd.grad(first.square().sum(), y)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


# ---- gather and scatter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_gather_copies_any_type_bit_for_bit(dtype: torch.dtype) -> None:
    x = torch.randint(0, 2, (2, 11, 65)).to(dtype)
    index = torch.tensor([[3, 3, -1, 0], [10, -1, -1, 2]])
    for narrow in (x, x[:, :, 0], x.unflatten(2, (5, 13))):
        got = ops.gather_tokens(narrow, index)
        for b in range(2):
            for k, i in enumerate(index[b].tolist()):
                assert torch.equal(got[b, k], narrow[b, i] if i >= 0 else torch.zeros_like(narrow[b, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_select_gather_then_scatter_back_restores_kept_rows(backend: ops.Backend) -> None:
    x = torch.randn(3, 50, 64)
    keep = ops.select_top(torch.randn(3, 50), torch.tensor([20, 0, 50]))
    with ops.backend(backend):
        back = ops.scatter_tokens(ops.gather_tokens(x, keep.indices), keep.indices, 50)
    kept = torch.zeros(3, 50, dtype=torch.bool)
    for b in range(3):
        kept[b, keep.indices[b, : keep.counts[b]]] = True
    assert torch.equal(back, torch.where(kept[..., None], x, 0.0))
    with ops.backend(backend):
        assert torch.equal(ops.gather_tokens(x, torch.arange(50).expand(3, -1)), x)  # keep all


def test_half_precision_merges_in_float32_and_keeps_its_type() -> None:
    x = torch.randn(2, 60, 64)
    matching = ops.bipartite_match(x.bfloat16(), 25)
    for backend in BACKENDS:
        with ops.backend(backend):
            y = x.bfloat16().requires_grad_()
            merged, sizes = ops.merge_tokens(y, None, matching)
            restored = ops.unmerge_tokens(merged, matching)
            assert torch.equal(merged, ops.merge_tokens(y.float(), None, matching)[0].bfloat16())
        assert merged.dtype == restored.dtype == torch.bfloat16
        assert sizes.dtype == torch.float32
        (gradient,) = torch.autograd.grad(restored.sum(), y)
        assert gradient.dtype == torch.bfloat16


def test_bits_do_not_depend_on_threads_or_strides(level: str) -> None:
    metric, x = torch.randn(4, 3, 301, 32), torch.randn(4, 301, 300)
    index = torch.randint(-1, 301, (4, 250))
    spread = (metric.transpose(1, 2).contiguous().transpose(1, 2), x.mT.contiguous().mT)
    results = []
    with ops.backend("native"):
        for threads, (m, t) in [(1, (metric, x)), (2, spread), (7, (metric, x))]:
            torch.set_num_threads(threads)
            matching = ops.bipartite_match(m, 120)
            results.append([*matching, *ops.merge_tokens(t, None, matching), ops.gather_tokens(t, index),
                            ops.scatter_tokens(t[:, :250], index, 301), *ops.select_top(t.flatten(1), 5000)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


# ---- as torch sees them


def test_operators_pass_opcheck() -> None:
    x, index = torch.randn(2, 9, 5, requires_grad=True), torch.randint(-1, 9, (2, 9))
    weights = torch.rand(2, 9)
    torch.library.opcheck(native_match, (torch.randn(2, 3, 9, 4), 3, 1, 0))
    torch.library.opcheck(native_select, (torch.randn(2, 9), torch.tensor([3, 0]), None, weights > 0.5))
    torch.library.opcheck(native_merge_weights, (index.clamp(min=0), weights, 9, True))
    for w in (None, weights):
        torch.library.opcheck(native_scatter, (x, index, w, 9))
        torch.library.opcheck(native_gather, (x, index, w))


class Reduce(torch.nn.Module):
    """Merge, then keep the best half: ids and rows together."""

    def forward(self, x: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        matching = ops.bipartite_match(x, 4)
        merged, sizes = ops.merge_tokens(x, None, matching)
        chosen = ops.select_top(ops.gather_tokens(scores, matching.kept), 5, 1)
        threshold = ops.select_threshold(scores, 0.0, size=6)
        rows = ops.gather_tokens(merged, chosen.indices)
        return (rows, sizes, chosen.indices, threshold.indices, ops.unmerge_tokens(merged, matching),
                ops.select_rows(scores, (4, 4), 8).indices, ops.adaptive_pool(x.unflatten(1, (4, 4)), (3, 3)))


def test_compiles_as_one_graph_forward_and_backward() -> None:
    x, scores = torch.randn(2, 16, 64, requires_grad=True), torch.randn(2, 16)
    compiled = torch.compile(Reduce(), fullgraph=True, backend="aot_eager")
    with ops.backend("native"):
        pairs = [f(x, scores) for f in (compiled, Reduce())]
        for a, b in zip(*pairs):
            torch.testing.assert_close(a, b)
        gradients = [torch.autograd.grad(p[0].square().sum() + p[4].sum(), x)[0] for p in pairs]
    torch.testing.assert_close(*gradients)


def test_exports_the_twin_with_a_dynamic_batch_and_runs_in_onnxruntime(onnx_run: Callable[..., list[Tensor]]) -> None:
    x, scores = torch.randn(2, 16, 64), torch.randn(2, 16)
    batch = torch.export.Dim("batch")
    program = torch.export.export(Reduce(), (x, scores), dynamic_shapes=({0: batch}, {0: batch}))
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    with ops.backend("native"):
        expected = Reduce()(x, scores)
    for got in (program.module()(x, scores), onnx_run(Reduce(), (x, scores))):
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, check_dtype=False, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("call", "message"), [
    (lambda x: ops.bipartite_match(x, 5, 0), "expected 0 to 4"), (lambda x: ops.bipartite_match(x[0], 1), "metric"),
    (lambda x: ops.bipartite_match(x, 1, order="random"), "order"), (lambda x: ops.bipartite_match(x, 1, -1), "protected"),
    (lambda x: ops.merge_tokens(x, torch.ones(1, 8), ops.bipartite_match(x, 1)), "sizes must be"),
    (lambda x: ops.merge_tokens(x, None, ops.bipartite_match(x, 1), "max"), "weighting"),
    (lambda x: ops.merge_tokens(x[:, :8], None, ops.bipartite_match(x, 1)), "do not fit"),
    (lambda x: ops.gather_tokens(x, torch.zeros(1, 2)), "int64"), (lambda x: ops.gather_tokens(x, torch.zeros(2, 2).long()), "do not fit"),
    (lambda x: ops.select_top(x[0].long(), 1), "floating"), (lambda x: ops.select_top(x[0], torch.ones(3).long()), "k must"),
    (lambda x: ops.select_top(x[0], 1, valid=torch.ones(1, 1, dtype=torch.bool)), "valid"),
    (lambda x: ops.select_rows(x[0], (2, 2), 1), "are not"), (lambda x: ops.adaptive_pool(x, (2, 2)), "does not fit"),
    (lambda x: ops.pixel_shuffle_tokens(x[..., None], 2), "divisible"),
])
def test_bad_arguments_are_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 9, 6))


def test_indices_outside_are_refused_by_the_kernels() -> None:
    x = torch.zeros(1, 4, 64)
    with ops.backend("native"):
        for index in (torch.tensor([[4]]), torch.tensor([[-2]])):
            with pytest.raises(ValueError, match="outside"):
                ops.gather_tokens(x, index)
            with pytest.raises(ValueError, match="outside"):
                ops.scatter_tokens(x[:, :1], index, 4)
