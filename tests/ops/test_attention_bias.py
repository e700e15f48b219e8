"""Position biases, soft cap, cosine score and dropout: values and gradients against float64, and against definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.ops import masks
from vlm.ops.attention_bias import Alibi, BucketBias, GridBias, KeyBias, alibi_slopes
from vlm.ops.attention_random import kept_pairs


def tensors(b: int, h: int, g: int, n: int, m: int, d: int) -> list[Tensor]:
    return [torch.randn(s, dtype=torch.float64) for s in ((b, h, n, d), (b, g, m, d), (b, g, m, d))]


Biased = Callable[[Tensor], ops.attention_bias.AnyBias]

KINDS: dict[str, tuple[tuple[int, ...], Biased]] = {
    "alibi": ((4,), Alibi),
    "alibi capped": ((4,), lambda s: Alibi(s, cap=20)),
    "alibi shared": ((1,), lambda s: Alibi(s, alignment="top-left")),
    "buckets": ((16, 4), lambda t: BucketBias(t, max_distance=50)),
    "buckets one-sided": ((16, 4), lambda t: BucketBias(t, bidirectional=False, max_distance=50)),
    "key": ((1, 67), KeyBias),
    "key by head": ((3, 4, 67), KeyBias),
}


@pytest.mark.parametrize("kind", KINDS)
def test_bias_values_and_gradients_match_float64(kind: str, level: str) -> None:
    shape, make = KINDS[kind]
    inputs = [*tensors(3, 4, 2, 45, 67, 8), torch.randn(shape, dtype=torch.float64) * 0.1]

    def call(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, bias=make(t), mask=masks.SymmetricWindow(60), softcap=3.0, return_lse=True)

    assert max(errors(call, inputs)) < 1e-5


@pytest.mark.parametrize(("rows", "columns"), [(1, 2), (3, 5), (8, 8), (16, 17), (5, 60)])
def test_grid_bias_matches_float64(rows: int, columns: int, level: str) -> None:
    n = rows * columns
    inputs = [*tensors(3, 2, 2, n, n, 8), torch.randn((2 * rows - 1) * (2 * columns - 1), 2, dtype=torch.float64)]

    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v, bias=GridBias(table, rows, columns)),)

    assert max(errors(call, inputs)) < 2e-5


def test_swin_v2_grid_bias_reads_query_minus_key() -> None:
    rows, columns = 3, 4
    table = torch.randn(5 * 7, 1)
    shape = masks.MaskShape(1, 1, 12, 12, torch.device("cpu"))
    dense = GridBias(table, rows, columns).dense(shape)[0, 0]
    for i in range(12):
        for j in range(12):
            dy, dx = i // columns - j // columns, i % columns - j % columns
            assert dense[i, j] == table[(dy + rows - 1) * 7 + dx + columns - 1, 0]


def test_t5_buckets_are_those_of_transformers() -> None:
    attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    d = torch.arange(-300, 300)
    for both in (False, True):
        bias = BucketBias(torch.zeros(32, 2), bidirectional=both, max_distance=128)
        assert torch.equal(bias.buckets(d), attention._relative_position_bucket(-d, both, 32, 128))


def test_lm_infinite_alibi_is_minus_slope_times_capped_distance() -> None:
    slopes = alibi_slopes(8)
    assert slopes.tolist() == [2.0 ** -(h + 1) for h in range(8)]
    assert alibi_slopes(12)[8:].tolist() == pytest.approx([2.0 ** -(h + 0.5) for h in range(4)])
    q, k, v = (t.float() for t in tensors(1, 8, 8, 30, 50, 8))
    d = torch.arange(20, 50)[:, None] - torch.arange(50)[None, :]
    with ops.backend("native"):
        got = ops.attention(q, k, v, causal=True, bias=Alibi(slopes, cap=10))
        want = ops.attention(q, k, v, causal=True, bias=-slopes[None, :, None, None] * d.abs().clamp(max=10))
    torch.testing.assert_close(got, want)


def test_soft_cap_is_a_tanh_of_the_scaled_logits() -> None:
    q, k, v = tensors(1, 2, 2, 9, 11, 8)
    logits = 5 * torch.tanh((q @ k.mT) / math.sqrt(8) / 5)
    want = logits.softmax(-1) @ v
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        with ops.backend(backend):  # type: ignore[arg-type]
            assert error(ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), softcap=5.0), want) < 2e-6


@pytest.mark.parametrize("cap", [0.5, 30.0])
def test_soft_cap_error_is_at_most_twice_that_of_torch(cap: float) -> None:
    inputs = [t * 3 for t in tensors(1, 2, 2, 150, 290, 32)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, softcap=cap, causal=True, return_lse=True)

    for ours, theirs in zip(errors(call, inputs), errors(call, inputs, "torch")):
        assert ours <= 2 * theirs + 1e-7


def test_swin_v2_cosine_ignores_the_length_of_q_and_k(level: str) -> None:
    q, k, v = (t.float() for t in tensors(2, 4, 2, 20, 20, 8))
    tau = torch.tensor([1.0, 5.0, 99.0, 300.0])
    with ops.backend("native"):
        first = ops.attention(q, k, v, score="cosine", temperature=tau)
        other = ops.attention(q * 7.5, k * 0.01, v, score="cosine", temperature=tau)
        clamped = ops.attention(q, k, v, score="cosine", temperature=tau.clamp(max=100))
    torch.testing.assert_close(first, other, rtol=1e-4, atol=1e-5)
    assert torch.equal(first, clamped)
    unit = F.normalize(q.double(), dim=-1) @ F.normalize(k.double(), dim=-1).repeat_interleave(2, 1).mT
    want = (unit * tau.clamp(max=100)[:, None, None]).softmax(-1) @ v.double().repeat_interleave(2, 1)
    assert error(first, want) < 2e-5


def test_swin_v2_temperature_has_a_gradient_where_it_is_not_clamped() -> None:
    inputs = [*tensors(2, 4, 2, 20, 300, 8), torch.tensor([2.0, 8.0, 30.0, 200.0], dtype=torch.float64)]
    inputs[1][1, :, 100:] = math.nan  # padded keys: their gradient is 0, whatever they hold
    lengths = torch.tensor([300, 100])

    def call(q: Tensor, k: Tensor, v: Tensor, tau: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, score="cosine", temperature=tau, key_mask=lengths, softcap=20.0, return_lse=True)

    got = run(call, inputs, "native", torch.float32)
    inputs[1][1, :, 100:] = 1.0
    for ours, want in zip(got, run(call, inputs, "torch", torch.float64)):
        assert error(ours, want) < 1e-4
    assert got[5][3] == 0
    assert (got[5][:3] != 0).all()
    assert max(errors(call, [*inputs[:3], torch.tensor([3.0])])) < 1e-4


def test_dropout_is_the_same_on_both_backends(level: str) -> None:
    inputs = tensors(2, 4, 2, 61, 300, 8)

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, causal=True, dropout=(0.3, 2**40 + 17), softcap=4.0, return_lse=True)

    assert max(errors(call, inputs)) < 1e-5


def test_dropout_drops_exactly_the_pairs_of_its_hash() -> None:
    """With v the identity the output is the dropped matrix itself."""
    q, k = torch.randn(2, 3, 20, 8), torch.randn(2, 3, 40, 8)
    kept = kept_pairs(0.4, 9, 2, 3, 20, 40, torch.device("cpu"))
    with ops.backend("native"):
        out, lse = ops.attention(q, k, torch.eye(40).expand(2, 3, 40, 40), dropout=(0.4, 9), return_lse=True)
        whole, plain = ops.attention(q, k, torch.eye(40).expand(2, 3, 40, 40), return_lse=True)
    assert torch.equal(out != 0, kept)
    torch.testing.assert_close(out, torch.where(kept, whole / 0.6, 0.0))
    assert torch.equal(lse, plain)


def test_dropout_bits_are_fair_and_independent() -> None:
    kept = kept_pairs(0.25, 3, 4, 8, 64, 128, torch.device("cpu"))
    assert abs(kept.float().mean() - 0.75) < 0.003
    for axis in range(4):  # neighbours along every axis agree as often as chance has it
        first, second = kept.narrow(axis, 0, kept.shape[axis] - 1), kept.narrow(axis, 1, kept.shape[axis] - 1)
        assert abs((first == second).float().mean() - 0.625) < 0.006
    assert not torch.equal(kept, kept_pairs(0.25, 4, 4, 8, 64, 128, torch.device("cpu")))


def test_the_twin_passes_gradcheck() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(1, 2, 1, 4, 5, 3))
    table, slopes = torch.randn(8, 2, dtype=torch.float64, requires_grad=True), torch.rand(2, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *t: ops.attention(*t[:3], bias=BucketBias(t[3]), softcap=2.0, dropout=(0.2, 5)), (q, k, v, table)
    )
    assert torch.autograd.gradcheck(
        lambda *t: ops.attention(*t[:3], bias=Alibi(t[3]), causal=True, score="cosine", temperature=t[4]), (q, k, v, slopes, tau)
    )


@pytest.mark.parametrize("make", [lambda s: Alibi(s[0]), BucketBias], ids=["alibi", "buckets"])
def test_bits_do_not_depend_on_the_thread_count(make: Biased, level: str) -> None:
    inputs = [torch.randn(2, 4, 400, 16) for _ in range(3)] + [torch.randn(8, 4)]

    def call(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v, bias=make(t), dropout=(0.1, 1), softcap=9.0),)

    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(call, inputs, "native", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize(("options", "message"), [
    ({"softcap": 0.0}, "softcap"),
    ({"score": "cosine"}, "temperature"),
    ({"temperature": torch.ones(2)}, "temperature"),
    ({"score": "cosine", "temperature": torch.ones(3)}, r"must be \[2\]"),
    ({"score": "euclid"}, "score"),
    ({"dropout": (1.0, 3)}, "dropout"),
    ({"bias": Alibi(torch.ones(3))}, "Alibi"),
    ({"bias": KeyBias(torch.ones(1, 4))}, "KeyBias"),
    ({"bias": GridBias(torch.ones(9, 2), 2, 2)}, "not a grid"),
    ({"bias": GridBias(torch.ones(8, 2), 2, 2)}, "table of 9"),
])
def test_wrong_options_are_named(options: dict[str, object], message: str) -> None:
    q = torch.zeros(1, 2, 5, 4)
    with pytest.raises(ValueError, match=message):
        ops.attention(q, q, q, **options)  # type: ignore[call-overload]
