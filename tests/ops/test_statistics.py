"""Statistics of the attention matrix: native kernels and twins against the matrix itself in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error
from vlm import ops
from vlm.ops import masks as ops_masks
from vlm.ops.statistics_native import native_column_sums, native_row_statistics, native_rows

SHAPES = [
    (1, 1, 1, 1, 1, 1), (2, 2, 1, 0, 3, 4), (2, 2, 1, 3, 0, 4), (0, 2, 1, 3, 3, 4), (1, 2, 2, 13, 31, 8), (1, 2, 2, 14, 32, 16),
    (1, 2, 2, 15, 33, 33), (1, 2, 2, 55, 255, 16), (1, 4, 2, 57, 256, 16), (1, 2, 1, 223, 257, 24), (1, 1, 1, 225, 521, 8),
    (2, 2, 2, 70, 30, 8),
]


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    b, h, g, n, m, d = shape
    return torch.randn(b, h, n, d, dtype=torch.float64), torch.randn(b, g, m, d, dtype=torch.float64)


def matrix(q: Tensor, k: Tensor, causal: bool = False, mask: Tensor | None = None, bias: Tensor | None = None,
           temperature: float = 1.0, offset: int | None = None) -> Tensor:
    """P [B, H, N, M] row by row, in float64, from the definition: nothing shared with the code under test."""
    b, h, n, d = q.shape
    m, group = k.shape[2], h // k.shape[1]
    offset = m - n if offset is None else offset
    p = torch.zeros(b, h, n, m, dtype=torch.float64)
    full = None if bias is None else bias.expand(b, h, n, m).double()
    logits = torch.einsum("bhnd,bhmd->bhnm", q.double(), k.double().repeat_interleave(group, 1)) / math.sqrt(d)
    for ib, ih, i in itertools.product(range(b), range(h), range(n)):
        row = logits[ib, ih, i] if full is None else logits[ib, ih, i] + full[ib, ih, i]
        allow = torch.ones(m, dtype=torch.bool) if mask is None else mask[ib].clone()
        if causal:
            allow &= torch.arange(m) <= i + offset
        if allow.any():
            p[ib, ih, i, allow] = torch.softmax(row[allow] / temperature, 0)
    return p


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_core_exact_attention_statistics_match_the_stored_matrix(shape: tuple[int, ...], level: str) -> None:
    b, h, _, n, m, _ = shape
    q, k = inputs(shape)
    mask, weights = torch.rand(b, m) < 0.7, torch.randn(b, h, n, dtype=torch.float64)
    rows = torch.tensor([[n - 1, -1, 0]]).expand(b, -1) if n else torch.zeros(b, 0, dtype=torch.int64)
    columns = torch.tensor([m - 1, 0]) if m else torch.zeros(0, dtype=torch.int64)
    for causal, use_mask, bias_shape, t in [(False, False, None, 1.0), (True, False, (1, h, n, m), 1.0), (False, True, (b, 1, 1, m), 0.5),
                                            (True, True, (b, h, n, 1), 2.0)]:
        bias = None if bias_shape is None else torch.randn(bias_shape, dtype=torch.float64)
        p = matrix(q, k, causal, mask if use_mask else None, bias, t)
        options = {"causal": causal, "key_mask": mask if use_mask else None, "temperature": t}
        for backend, dtype, limit in (("native", torch.float32, 1e-5), ("torch", torch.float64, 1e-12)):
            a, c = q.to(dtype), k.to(dtype)
            here = options | {"bias": None if bias is None else bias.to(dtype)}
            with ops.backend(backend):
                assert error(ops.attention_column_sums(a, c, weights=weights.to(dtype), **here), (weights[..., None] * p).sum(2)) < limit
                assert error(ops.attention_column_sums(a, c, **here), p.sum(2)) < limit
                chosen = ops.attention_rows(a, c, rows, **here)
                for r, i in enumerate([n - 1, -1, 0] if n else []):
                    assert error(chosen[:, :, r], p[:, :, i] if i >= 0 else torch.zeros_like(p[:, :, 0])) < limit
                assert error(ops.attention_columns(a, c, columns, **here), p[..., columns]) < limit
                got = ops.attention_row_statistics(a, c, **here)
            entropy = torch.special.entr(p).sum(-1)
            assert error(got.entropy, entropy) < limit
            empty = p.sum(-1) == 0
            assert torch.equal(got.lse == -math.inf, empty)
            assert torch.equal(got.best == -1, empty)
            if m and n and b:
                picked = p.gather(3, got.best.clamp(min=0)[..., None])[..., 0]
                assert (picked >= p.amax(-1) * (1 - 1e-5)).all()


def test_lse_is_that_of_attention_and_may_be_handed_over() -> None:
    q, k = (t.float() for t in inputs((2, 4, 2, 70, 300, 16)))
    v = torch.randn(2, 2, 300, 8)
    with ops.backend("native"):
        _, lse = ops.attention(q, k, v, causal=True, return_lse=True)
        assert error(ops.attention_lse(q, k, causal=True), lse) < 1e-6
        given_lse, own = (ops.attention_column_sums(q, k, causal=True, lse=t) for t in (lse, None))
    assert error(given_lse, own) < 1e-6


def test_alignment_top_left() -> None:
    q, k = inputs((1, 2, 2, 5, 9, 8))
    with ops.backend("native"):
        got = ops.attention_column_sums(q.float(), k.float(), causal=True, alignment="top-left")
    assert error(got, matrix(q, k, causal=True, offset=0).sum(2)) < 1e-6


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    q, k = inputs((1, 2, 2, 1500, 300, 64))
    exact = matrix(q, k)
    for call, truth in ((ops.attention_column_sums, exact.sum(2)), (ops.attention_entropy, torch.special.entr(exact).sum(-1))):
        found = {}
        for backend in ("native", "torch"):
            with ops.backend(backend):
                found[backend] = error(call(q.float(), k.float()), truth)
        assert found["native"] <= 2 * found["torch"] + 1e-7


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_removed_keys_and_queries_of_weight_0_are_not_read(backend: ops.Backend, level: str) -> None:
    q, k = (t.float() for t in inputs((1, 2, 2, 40, 70, 8)))
    mask, weights = torch.rand(1, 70) < 0.5, (torch.rand(1, 1, 40) < 0.5).float()
    rows = weights[0, 0].nonzero()[:, 0]
    dirty_q = torch.where(weights[..., None] != 0, q, math.nan)
    dirty_k = torch.where(mask[:, None, :, None], k, math.nan)
    with ops.backend(backend):
        for call in (lambda a, b: ops.attention_column_sums(a, b, weights=weights, key_mask=mask),
                     lambda a, b: ops.attention_rows(a, b, rows, key_mask=mask)):
            assert torch.equal(call(q, torch.where(mask[:, None, :, None], k, 0.0)), call(dirty_q, dirty_k))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_empty_rows_are_zeros(backend: ops.Backend) -> None:
    q, k = (t.float() for t in inputs((2, 2, 2, 6, 4, 8)))
    mask = torch.tensor([[True] * 4, [False] * 4])
    with ops.backend(backend):
        lse, entropy, best = ops.attention_row_statistics(q, k, causal=True, key_mask=mask)
        sums = ops.attention_column_sums(q, k, causal=True, key_mask=mask)
        rows = ops.attention_rows(q, k, torch.tensor([0, 5]), causal=True, key_mask=mask)
    assert (lse[1] == -math.inf).all()
    assert (lse[0, :, :2] == -math.inf).all()
    assert lse[0, :, 2:].isfinite().all()
    assert (entropy[1] == 0).all()
    assert (best[1] == -1).all()
    assert (sums[1] == 0).all()
    assert (rows[1] == 0).all()
    assert (rows[0, :, 0] == 0).all()
    assert error(rows[0, :, 1].sum(-1), torch.ones(2)) < 1e-6


def test_equal_logits_give_the_lowest_key_and_the_entropy_of_all() -> None:
    q, k = torch.zeros(1, 1, 3, 8), torch.randn(1, 1, 700, 8)
    for backend in ("native", "torch"):
        with ops.backend(backend):
            _, entropy, best = ops.attention_row_statistics(q, k, key_mask=torch.tensor([[False, *[True] * 699]]))
        assert (best == 1).all()
        torch.testing.assert_close(entropy, torch.full((1, 1, 3), math.log(699.0)))


@pytest.mark.parametrize("shape", [(3, 2, 2, 250, 300, 16), (1, 8, 2, 130, 1100, 8)], ids=str)
def test_bits_do_not_depend_on_the_thread_count_or_strides(shape: tuple[int, ...], level: str) -> None:
    q, k = (t.float() for t in inputs(shape))
    mask, rows = torch.rand(shape[0], shape[4]) < 0.8, torch.arange(0, shape[3], 7)
    spread = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k)]
    columns = [t.mT.contiguous().mT for t in (q, k)]  # the last axis is not contiguous
    results = []
    with ops.backend("native"):
        for threads, (a, b) in [(1, (q, k)), (2, spread), (3, columns), (7, (q, k))]:
            torch.set_num_threads(threads)
            results.append([ops.attention_column_sums(a, b, causal=True, key_mask=mask),
                            *ops.attention_row_statistics(a, b, causal=True, key_mask=mask),
                            ops.attention_rows(a, b, rows, causal=True, key_mask=mask)])
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert torch.equal(x, y)


@given(b=st.integers(1, 2), g=st.integers(1, 2), r=st.integers(1, 3), n=st.integers(0, 40), m=st.integers(0, 300),
       d=st.integers(1, 40), causal=st.booleans(), lengths=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_shapes(b: int, g: int, r: int, n: int, m: int, d: int, causal: bool, lengths: bool) -> None:
    q, k = inputs((b, g * r, g, n, m, d))
    mask = torch.randint(0, m + 1, (b,)) if lengths else torch.rand(b, m) < 0.5
    rows = torch.randint(-1, n, (b, 3)) if n else torch.full((b, 2), -1)
    for call in (lambda a, c: ops.attention_column_sums(a, c, causal=causal, key_mask=mask),
                 lambda a, c: ops.attention_entropy(a, c, causal=causal, key_mask=mask),
                 lambda a, c: ops.attention_rows(a, c, rows, causal=causal, key_mask=mask)):
        with ops.backend("native"):
            got = call(q.float(), k.float())
        assert error(got, call(q, k)) < 1e-5


# ---- pagerank and focus


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_aim_pagerank_is_the_power_of_the_matrix_and_sums_to_1(backend: ops.Backend) -> None:
    q, k = inputs((2, 3, 3, 50, 50, 8))
    mask = torch.arange(50)[None, :] < torch.tensor([[50], [37]])
    p = matrix(q, k, True, mask, temperature=0.1)
    x = (mask.double() / mask.sum(1, keepdim=True))[:, None, :].expand(2, 3, 50)
    q[1, :, 37:] = math.nan  # padded tokens are no queries either
    for steps in range(6):
        with ops.backend(backend):
            got = ops.attention_pagerank(q.float(), k.float(), temperature=0.1, iterations=steps, causal=True, key_mask=mask)
        assert error(got, x) < 1e-5
        assert error(got.sum(-1), torch.ones(2, 3)) < 1e-5
        x = torch.einsum("bhi,bhij->bhj", x, p)


def test_aim_one_iteration_is_the_column_mean() -> None:
    q, k = inputs((1, 4, 4, 30, 30, 8))
    means = matrix(q, k, True, temperature=0.1).mean(2)
    with ops.backend("native"):
        rank = ops.attention_pagerank(q.float(), k.float(), temperature=0.1, iterations=1, causal=True)
    assert error(rank.square().mean(1).sqrt(), means.square().mean(1).sqrt()) < 1e-5


def test_aim_causal_pagerank_drifts_to_the_first_token() -> None:
    q, k = (t.float() for t in inputs((1, 1, 1, 20, 20, 8)))
    first = [float(ops.attention_pagerank(q, k, iterations=n, causal=True)[0, 0, 0]) for n in (1, 5, 200)]
    assert first[0] < first[1] < first[2]
    assert first[2] > 0.99


def test_pagerank_with_damping_is_a_mixture_with_the_uniform_start() -> None:
    q, k = inputs((1, 2, 2, 20, 20, 8))
    p, x = matrix(q, k), torch.full((1, 2, 20), 1 / 20, dtype=torch.float64)
    for _ in range(3):
        x = 0.85 * torch.einsum("bhi,bhij->bhj", x, p) + 0.15 / 20
    with ops.backend("native"):
        assert error(ops.attention_pagerank(q.float(), k.float(), iterations=3, damping=0.15), x) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_fopru_received_and_paid_attention(backend: ops.Backend) -> None:
    q, k = inputs((2, 3, 3, 26, 26, 8))
    p = matrix(q, k).mean(1)
    with ops.backend(backend):
        whole = ops.attention_focus(q.float(), k.float())
        cut = ops.attention_focus(q.float(), k.float(), leading=1)
    assert error(whole.received, p.mean(1)) < 1e-5
    assert error(whole.received.sum(1), torch.ones(2)) < 1e-5
    assert error(whole.paid, torch.full((2, 26), 1 / 26)) < 1e-5
    assert whole.by_received.all()  # the rounding noise of a constant never wins
    assert torch.equal(whole.score, whole.received)
    patches = p[:, 1:, 1:]
    assert error(cut.received, patches.mean(1)) < 1e-5
    assert error(cut.paid, patches.mean(2)) < 1e-5
    assert error(cut.received.sum(1), 1 - p[:, 1:, 0].mean(1)) < 1e-5
    assert torch.equal(cut.by_received, patches.mean(1).var(1) >= patches.mean(2).var(1))


def test_fopru_paid_attention_wins_where_it_varies_more() -> None:
    """One token looks at the class token, the others at all patches alike."""
    q, k = torch.zeros(1, 1, 9, 2), torch.zeros(1, 1, 9, 2)
    q[0, 0, 4, 0], k[0, 0, 0, 0] = 10.0, 10.0
    focus = ops.attention_focus(q, k, leading=1)
    assert not focus.by_received.any()
    assert int(focus.score.argmin()) == 3  # token 4 pays the least to other patches


# ---- as torch sees them


def test_half_precision_is_converted_and_results_are_float32() -> None:
    q, k = (t.bfloat16() for t in inputs((1, 2, 2, 40, 60, 16)))
    with ops.backend("native"):
        got = ops.attention_column_sums(q, k)
    assert got.dtype == torch.float32
    assert error(got, matrix(q, k).sum(2)) < 1e-5
    with torch.autocast("cpu", torch.bfloat16), ops.backend("torch"):
        assert error(ops.attention_column_sums(q, k), matrix(q, k).sum(2)) < 1e-5


MASKS = [(None, None), (torch.arange(18).view(2, 9) % 3 > 0, torch.randn(1, 4, 5, 9))]


@pytest.mark.parametrize(("mask", "bias"), MASKS, ids=["plain", "full"])
def test_operators_pass_opcheck(mask: Tensor | None, bias: Tensor | None) -> None:
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 9, 8)
    near = ops_masks.MaskProgram(ops_masks.Window(3), ops_masks.Dense(torch.rand(1, 4, 5, 9) < 0.8))
    lowered = (None, None, None) if mask is None else near.lower(ops_masks.MaskShape(2, 4, 5, 9, q.device))
    shared = (q, k, mask, bias, None if mask is None else torch.randn(4, 13), *lowered[1:], lowered[0], 0.3, True, 4, 0, 0,
              0.0 if mask is None else 5.0)
    torch.library.opcheck(native_row_statistics, (*shared, True))
    torch.library.opcheck(native_row_statistics, (*shared, False))
    torch.library.opcheck(native_column_sums, (*shared, torch.zeros(2, 4, 5), torch.randn(2, 4, 5)))
    torch.library.opcheck(native_rows, (*shared, torch.tensor([[0, 4, -1], [1, 1, 2]])))


def everything(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    return (ops.attention_column_sums(q, k, causal=True), *ops.attention_row_statistics(q, k),
            ops.attention_rows(q, k, torch.tensor([0, 2])), ops.attention_pagerank(q, k, iterations=2, temperature=0.5),
            ops.attention_focus(q, k, leading=1).score)


def test_compiles_as_one_graph() -> None:
    q, k = torch.randn(2, 2, 12, 8, requires_grad=True), torch.randn(2, 2, 12, 8)
    with ops.backend("native"):
        expected = everything(q, k)
        got = torch.compile(everything, fullgraph=True, backend="aot_eager")(q, k)
    for a, b in zip(got, expected):
        assert not a.requires_grad
        torch.testing.assert_close(a, b)


class Statistics(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        return everything(q, k)


def test_exports_the_twin_with_dynamic_shapes() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=4)
    example = (torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8))
    program = torch.export.export(Statistics(), example, dynamic_shapes=({0: batch, 2: length}, {0: batch, 2: length}))
    q, k = torch.randn(3, 2, 17, 8), torch.randn(3, 2, 17, 8)
    with ops.backend("native"):
        expected = everything(q, k)
    for a, b in zip(program.module()(q, k), expected):
        torch.testing.assert_close(a, b)


def test_the_twin_runs_in_onnxruntime(onnx_run: Callable[..., list[Tensor]]) -> None:
    q, k = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    for a, b in zip(onnx_run(Statistics(), (q, k)), everything(q, k)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"k": torch.zeros(1, 2, 6, 5)}, "want q"), ({"q": torch.zeros(1, 3, 6, 8)}, "multiple"),
    ({"key_mask": torch.ones(1, 5, dtype=torch.bool)}, "key_mask must be bool"), ({"temperature": 0.0}, "temperature"),
    ({"alignment": "middle"}, "alignment"), ({"weights": torch.ones(1, 2, 5)}, "weights"), ({"bias": torch.zeros(1, 2, 5, 6)}, "bias"),
    ({"q": torch.zeros(1, 2, 6, 8, dtype=torch.float64)}, "floating type"),
])
def test_bad_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"q": torch.zeros(1, 2, 6, 8), "k": torch.zeros(1, 2, 6, 8)} | change
    with pytest.raises(ValueError, match=message):
        ops.attention_column_sums(**arguments)


def test_rows_outside_are_refused_and_unknown_options_named() -> None:
    q = torch.zeros(1, 2, 6, 8)
    with ops.backend("native"), pytest.raises(ValueError, match="outside"):
        ops.attention_rows(q, q, torch.tensor([6]))
    with pytest.raises(ValueError, match="rows must be integers"):
        ops.attention_rows(q, q, torch.tensor([0.5]))
    with pytest.raises(TypeError, match="windows"):
        ops.attention_entropy(q, q, windows=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="same tokens"):
        ops.attention_pagerank(q, torch.zeros(1, 2, 5, 8))
