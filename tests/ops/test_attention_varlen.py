"""Packed sequences: equal to a loop over them, and to segments."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import error, run
from vlm import ops
from vlm.ops import masks


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(
    ("queries", "keys"), [((5, 0, 300, 1, 14), (5, 3, 300, 1, 14)), ((1, 1, 1), (40, 7, 260)), ((9,), (4,)), ((0,), (0,))]
)
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 6)])
def test_core_exact_attention_varlen_is_a_loop(backend: ops.Backend, queries: tuple[int, ...], keys: tuple[int, ...], causal: bool,
                                               window: int | None) -> None:
    inputs = [torch.randn(n, h, 8, dtype=torch.float64) for n, h in ((sum(queries), 4), (sum(keys), 2), (sum(keys), 2))]
    at, of = starts(*queries), starts(*keys)

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention_varlen(q, k, v, at, of, causal=causal, window=window, return_lse=True)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        outs, sums = [], []
        for s in range(len(queries)):
            parts = q[at[s] : at[s + 1]], k[of[s] : of[s + 1]], v[of[s] : of[s + 1]]
            out, lse = ops.attention(*(t.transpose(0, 1)[None] for t in parts), causal=causal,
                                     mask=None if window is None else masks.Window(window), return_lse=True)
            outs.append(out[0].transpose(0, 1))
            sums.append(lse[0].T)
        return torch.cat(outs), torch.cat(sums)

    for got, want in zip(run(packed, inputs, backend, torch.float32), run(loop, inputs, "torch", torch.float64)):
        assert got.shape == want.shape
        assert torch.equal(got.isinf(), want.isinf())
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)


def test_core_exact_attention_segments_are_varlen() -> None:
    lengths = (70, 1, 300, 29)
    q, k, v = (torch.randn(400, 2, 16) for _ in range(3))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with ops.backend("native"):
        got = ops.attention_varlen(q, k, v, starts(*lengths), causal=True)
        packed = ops.attention(*(t.transpose(0, 1)[None] for t in (q, k, v)), causal=True, mask=masks.Segments(ids))
    assert torch.equal(got, packed[0].transpose(0, 1))


def test_varlen_compiles() -> None:
    q, at = torch.randn(30, 2, 8, requires_grad=True), starts(10, 20)
    with ops.backend("native"):
        got = torch.compile(ops.attention_varlen, fullgraph=True, backend="aot_eager")(q, q, q, at, causal=True)
        want = ops.attention_varlen(q, q, q, at, causal=True)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(t.square().sum(), q)[0] for t in (got, want)))


@pytest.mark.parametrize(("change", "message"), [
    ({"query_starts": torch.tensor([0, 3])}, "ascend from 0 to 5"),
    ({"query_starts": torch.tensor([0, 4, 3, 5])}, "ascend"),
    ({"query_starts": torch.tensor([0.0, 5.0])}, "must be integer"),
    ({"key_starts": torch.tensor([0, 1, 5])}, "1 sequences of queries and 2 of keys"),
    ({"window": 0}, "window is 0"),
    ({"q": torch.zeros(1, 5, 2, 4)}, "3 axes"),
])
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"q": torch.zeros(5, 2, 4), "k": torch.zeros(5, 2, 4), "v": torch.zeros(5, 2, 4),
                                    "query_starts": torch.tensor([0, 5])} | change
    with pytest.raises(ValueError, match=message):
        ops.attention_varlen(**arguments)  # type: ignore[call-overload]


def test_error_is_small_at_every_level(level: str) -> None:
    q, k, v = (torch.randn(333, 2, 16, dtype=torch.float64) for _ in range(3))
    at = starts(100, 200, 33)
    want = ops.attention_varlen(q, k, v, at, causal=True)
    with ops.backend("native"):
        assert error(ops.attention_varlen(q.float(), k.float(), v.float(), at, causal=True), want) < 1e-5
