"""Statistics of the attention matrix under mask programs and biases by position: kernels and twins against float64 by definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error
from tests.ops.test_attention_masks import ATOMS, Made, number, pairs_allowed
from vlm import ops
from vlm.ops import masks
from vlm.ops.attention_bias import Alibi, BucketBias, GridBias, KeyBias, alibi_slopes
from vlm.ops.masks import MaskProgram, MaskShape

BACKENDS = (("native", torch.float32, 2e-5), ("torch", torch.float64, 1e-12))


def tensors(b: int, h: int, g: int, n: int, m: int, d: int, draw: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    return (torch.randn(b, h, n, d, dtype=torch.float64, generator=draw), torch.randn(b, g, m, d, dtype=torch.float64, generator=draw))


def matrix(q: Tensor, k: Tensor, allow: Tensor, bias: Tensor | None = None, softcap: float | None = None, temperature: float = 1.0) -> Tensor:
    """P [B, H, N, M] in float64 from the definition; allow [B, H, N, M]."""
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) / math.sqrt(q.shape[3])
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logits = (logits if bias is None else logits + bias) / temperature
    weights = torch.where(allow, (logits - torch.where(allow, logits, -1e300).amax(-1, keepdim=True)).exp(), 0.0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)


def check(q: Tensor, k: Tensor, p: Tensor, **options: Any) -> None:
    """Every statistic of both paths against the matrix."""
    b, h, n, m = p.shape
    weights, rows, columns = torch.randn(b, h, n, dtype=torch.float64), torch.randint(-1, n, (b, 3)), torch.randint(0, m, (b, 2))
    empty = p.sum(-1) == 0
    expected = torch.stack([torch.where(rows[i] >= 0, 1.0, 0.0)[None, :, None] * p[i][:, rows[i].clamp(min=0)] for i in range(b)])
    taken = torch.stack([p[i][:, :, columns[i]] for i in range(b)])
    for backend, dtype, limit in BACKENDS:
        a, c = q.to(dtype), k.to(dtype)
        if isinstance(options.get("bias"), Tensor):
            options["bias"] = options["bias"].to(dtype)
        with ops.backend(backend):  # type: ignore[arg-type]
            found = ops.attention_row_statistics(a, c, **options)
            assert torch.equal(found.lse == -math.inf, empty)
            assert torch.equal(found.best == -1, empty)
            assert error(found.entropy, torch.special.entr(p).sum(-1)) < limit
            assert (p.gather(3, found.best.clamp(min=0)[..., None])[..., 0] >= p.amax(-1) * (1 - 1e-5)).all()
            assert torch.equal(ops.attention_lse(a, c, **options), found.lse)
            for lse in (None, found.lse):
                assert error(ops.attention_column_sums(a, c, weights=weights.to(dtype), lse=lse, **options), (weights[..., None] * p).sum(2)) < limit
            assert error(ops.attention_rows(a, c, rows, **options), expected) < limit
            assert error(ops.attention_columns(a, c, columns, **options), taken) < limit


@pytest.mark.parametrize("make", ATOMS, ids=lambda f: f.__name__)
def test_core_exact_attention_statistics_under_every_atom(make: Callable[..., Made], level: str) -> None:
    draw = torch.Generator().manual_seed(5)
    for b, h, g, n, m in [(2, 2, 1, 1, 1), (2, 2, 1, 31, 37), (1, 4, 2, 61, 300), (1, 2, 2, 40, 13)]:
        atom, pair = make(draw, b, h, n, m)
        q, k = tensors(b, h, g, n, m, 8, draw)
        check(q, k, matrix(q, k, pairs_allowed([pair], b, h, n, m)), mask=atom)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4), n=st.integers(1, 90), m=st.integers(1, 90), opened=st.booleans(),
       causal=st.booleans(), cap=st.booleans())
@settings(max_examples=40, deadline=None, derandomize=True)
def test_random_programs_with_what_else_a_call_may_say(seed: int, count: int, n: int, m: int, opened: bool, causal: bool, cap: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    atoms = [ATOMS[number(draw, 0, len(ATOMS) - 1)](draw, 2, 4, n, m)[0] for _ in range(count)]
    if opened:
        atoms.append(masks.GlobalTokens(torch.rand(2, n, generator=draw) < 0.1, torch.rand(2, m, generator=draw) < 0.1))
    program = MaskProgram(*atoms)
    key_mask = torch.rand(2, m, generator=draw) < 0.8
    allow = program.allow(MaskShape(2, 4, n, m, torch.device("cpu"))) & key_mask[:, None, None]  # type: ignore[operator]
    allow = allow.expand(2, 4, n, m)
    if causal:
        allow = allow & (torch.arange(m) <= torch.arange(n)[:, None] + m - n)
    q, k = tensors(2, 4, 2, n, m, 8, draw)
    options: dict[str, Any] = {"softcap": 1.5 if cap else None, "temperature": 0.5}
    check(q, k, matrix(q, k, allow, **options), mask=program, causal=causal, key_mask=key_mask, **options)


@pytest.mark.parametrize("name", ["alibi", "buckets", "grid", "long grid", "keys", "tensor"])
def test_statistics_take_the_biases_of_attention(name: str, level: str) -> None:
    h, (n, m) = 4, {"grid": (35, 35), "long grid": (323, 323)}.get(name, (45, 290))
    made: dict[str, Any] = {
        "alibi": lambda: Alibi(alibi_slopes(h).double(), cap=40),
        "buckets": lambda: BucketBias(torch.randn(32, h, dtype=torch.float64)),
        "grid": lambda: GridBias(torch.randn(9 * 13, h, dtype=torch.float64), 5, 7),
        "long grid": lambda: GridBias(torch.randn(33 * 37, h, dtype=torch.float64), 17, 19),
        "keys": lambda: KeyBias(torch.randn(2, m, dtype=torch.float64)),
        "tensor": lambda: torch.randn(1, h, n, 1, dtype=torch.float64),
    }
    bias = made[name]()
    dense = bias if isinstance(bias, Tensor) else bias.dense(MaskShape(2, h, n, m, torch.device("cpu")))
    q, k = tensors(2, h, 2, n, m, 8)
    exists = torch.rand(2, m) < 0.8
    near = (torch.arange(n)[:, None] + m - n - torch.arange(m)).abs() < 200
    mask = MaskProgram(masks.Window(200, causal=False), masks.KeyPadding(exists))
    allow = (near & exists[:, None, None]).expand(2, h, n, m)
    for options in ({"temperature": 1.0}, {"temperature": 0.5, "softcap": 2.0}):
        check(q, k, matrix(q, k, allow, dense, **options), mask=mask, bias=bias, **options)


def test_what_a_mask_says_in_other_words_gives_the_same_bits(level: str) -> None:
    q, k = (t.float() for t in tensors(2, 4, 2, 70, 300, 16))
    exists, rows = torch.rand(2, 300) < 0.7, torch.tensor([0, 40, 69])
    ways: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"mask": MaskProgram()}), ({"causal": True}, {"mask": masks.Causal()}), ({"key_mask": exists}, {"mask": masks.KeyPadding(exists)}),
        ({"causal": True, "alignment": "top-left"}, {"mask": masks.Causal("top-left")}),
        ({"causal": True, "key_mask": exists}, {"mask": MaskProgram(masks.Causal(), masks.KeyPadding(exists))}),
    ]
    with ops.backend("native"):
        for plain, masked in ways:
            for call in (ops.attention_column_sums, ops.attention_lse, ops.attention_entropy, lambda a, c, **o: ops.attention_rows(a, c, rows, **o)):
                assert torch.equal(call(q, k, **plain), call(q, k, **masked))


def test_lse_under_a_program_is_that_of_attention(level: str) -> None:
    q, k = (t.float() for t in tensors(2, 4, 2, 70, 300, 16))
    options: dict[str, Any] = {"mask": MaskProgram(masks.Causal(), masks.Lambda(40, 3)), "bias": Alibi(alibi_slopes(4)), "softcap": 3.0}
    with ops.backend("native"):
        _, lse = ops.attention(q, k, k, return_lse=True, **options)
        torch.testing.assert_close(ops.attention_lse(q, k, **options), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_aim_pagerank_and_fopru_focus_under_a_program(backend: ops.Backend) -> None:
    q, k = tensors(2, 2, 2, 33, 33, 8)
    ids = torch.tensor([[0] * 12 + [1] * 21, [0] * 20 + [1] * 13])
    lengths = torch.tensor([33, 29])
    mask = MaskProgram(masks.Segments(ids), masks.KeyPadding(lengths))
    live = torch.arange(33) < lengths[:, None]
    allow = ((ids[:, :, None] == ids[:, None, :]) & live[:, None]).unsqueeze(1).expand(2, 2, 33, 33)
    p = matrix(q, k, allow)
    x = (live.double() / lengths[:, None])[:, None].expand(2, 2, 33)
    for _ in range(3):
        x = torch.einsum("bhi,bhij->bhj", x, p)
    with ops.backend(backend):
        rank = ops.attention_pagerank(q.float(), k.float(), iterations=3, mask=mask)
        focus = ops.attention_focus(q.float(), k.float(), leading=2, mask=mask)
    assert error(rank, x) < 1e-5
    for document in (0, 1):  # nothing leaves a document
        before = ((ids == document) & live).sum(1) / lengths
        after = (rank * ((ids == document) & live)[:, None]).sum(2)
        torch.testing.assert_close(after, before[:, None].expand(2, 2).float())
    heads = p.mean(1)[:, 2:, 2:]
    assert error(focus.received, heads.mean(1)) < 1e-5
    assert error(focus.paid, heads.mean(2)) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_padded_keys_of_a_program_and_queries_of_weight_0_are_not_read(backend: ops.Backend) -> None:
    q, k = (t.float() for t in tensors(1, 2, 2, 40, 70, 8))
    exists, weights = torch.rand(1, 70) < 0.5, (torch.rand(1, 1, 40) < 0.5).float()
    options: dict[str, Any] = {"mask": MaskProgram(masks.KeyPadding(exists), masks.Window(30), masks.GlobalTokens(torch.arange(40)[None] < 2, torch.arange(70)[None] < 2)),
                               "softcap": 4.0}
    rows = weights[0, 0].nonzero()[:, 0]
    dirty_q = torch.where(weights[..., None] != 0, q, math.nan)
    dirty_k = torch.where(exists[:, None, :, None], k, math.nan)
    clean_k = torch.where(exists[:, None, :, None], k, 0.0)
    with ops.backend(backend):
        for call in (lambda a, c: ops.attention_column_sums(a, c, weights=weights, **options), lambda a, c: ops.attention_rows(a, c, rows, **options)):
            assert torch.equal(call(q, clean_k), call(dirty_q, dirty_k))
        assert torch.equal(ops.attention_entropy(q, clean_k, **options), ops.attention_entropy(q, dirty_k, **options))


def test_bits_do_not_depend_on_the_thread_count(level: str) -> None:
    q, k = (t.float() for t in tensors(2, 4, 2, 250, 600, 16))
    mask = MaskProgram(masks.Window(90), masks.GlobalTokens(torch.rand(2, 250) < 0.02, torch.rand(2, 600) < 0.02),
                       masks.Dense(torch.rand(1, 4, 250, 600) < 0.9))
    options: dict[str, Any] = {"mask": mask, "bias": Alibi(alibi_slopes(4)), "softcap": 5.0}
    results = []
    with ops.backend("native"):
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append([ops.attention_column_sums(q, k, **options), *ops.attention_row_statistics(q, k, **options),
                            ops.attention_rows(q, k, torch.arange(0, 250, 9), **options)])
    for other in results[1:]:
        assert all(torch.equal(a, c) for a, c in zip(results[0], other))


class Masked(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, slopes: Tensor, lengths: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        options: dict[str, Any] = {"mask": MaskProgram(masks.Segments(ids, shared=0), masks.KeyPadding(lengths), masks.Lambda(4, 1)),
                                   "bias": Alibi(slopes), "softcap": 3.0}
        return (ops.attention_column_sums(q, k, **options), *ops.attention_row_statistics(q, k, **options),
                ops.attention_rows(q, k, torch.tensor([0, 2]), **options), ops.attention_columns(q, k, torch.tensor([1]), **options),
                ops.attention_pagerank(q, k, iterations=2, **options), ops.attention_focus(q, k, leading=1, **options).score)


def example(b: int, n: int) -> tuple[Tensor, ...]:
    q, k = torch.randn(b, 2, n, 8), torch.randn(b, 2, n, 8)
    return q, k, alibi_slopes(2), torch.randint(3, n + 1, (b,)), torch.randint(0, 3, (b, n)).sort(1).values


def test_programs_compile_export_and_run_in_onnxruntime(onnx_run: Callable[..., list[Tensor]]) -> None:
    first = example(2, 12)
    with ops.backend("native"):
        expected = Masked()(*first)
        for a, c in zip(torch.compile(Masked(), fullgraph=True, backend="aot_eager")(*first), expected):
            torch.testing.assert_close(a, c)
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=4)
    tensor = {0: batch, 2: length}
    program = torch.export.export(Masked(), first, dynamic_shapes=(tensor, tensor, None, {0: batch}, {0: batch, 1: length}))
    other = example(3, 17)
    with ops.backend("native"):
        for a, c in zip(program.module()(*other), Masked()(*other)):
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
    for a, c in zip(onnx_run(Masked(), first), expected):
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_named() -> None:
    q = torch.zeros(2, 1, 5, 4)
    for options, message in (({"softcap": 0.0}, "softcap is 0.0"), ({"mask": masks.Segments(torch.zeros(1, 7, dtype=torch.long))}, "do not fit 5"),
                             ({"bias": Alibi(torch.ones(3))}, "one number for each of 1 heads")):
        with ops.backend("native"), pytest.raises(ValueError, match=message):
            ops.attention_row_statistics(q, q, **options)
