"""Exact checks and pitfalls of the method book that go across the files of the families."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.ops.oracle import error
from vlm import ops
from vlm.ops import masks
from vlm.ops.masks import MaskProgram

both = pytest.mark.parametrize("backend", ["native", "torch"])


def heads(n: int, m: int | None = None) -> list[Tensor]:
    m = n if m is None else m
    return [torch.randn(2, 4, n, 8), torch.randn(2, 2, m, 8), torch.randn(2, 2, m, 6)]


# ---- core-exact-attention


@both
def test_core_exact_attention_permuted_keys_change_nothing_and_permuted_queries_permute(backend: ops.Backend) -> None:
    q, k, v = heads(37, 290)
    exists, keys, queries = torch.rand(2, 290) < 0.7, torch.randperm(290), torch.randperm(37)
    with ops.backend(backend):
        out = ops.attention(q, k, v, key_mask=exists)
        assert error(ops.attention(q, k[:, :, keys], v[:, :, keys], key_mask=exists[:, keys]), out) < 1e-6
        moved = ops.attention(q[:, :, queries], k, v, key_mask=exists)
    assert error(moved, out[:, :, queries]) < 1e-6


@both
def test_core_exact_attention_bias_is_added_behind_scale_and_cap(backend: ops.Backend) -> None:
    q, k, v = heads(9, 11)
    bias = torch.randn(1, 4, 9, 11)
    products = q.double() @ k.double().repeat_interleave(2, 1).mT
    p = (2.0 * torch.tanh(0.3 * products / 2.0) + bias.double()).softmax(-1)
    with ops.backend(backend):
        got = ops.attention(q, k, v, bias=bias, scale=0.3, softcap=2.0)
    assert error(got, p @ v.double().repeat_interleave(2, 1)) < 1e-6


@both
def test_core_exact_attention_a_large_negative_bias_is_an_average_and_minus_infinity_a_removal(backend: ops.Backend) -> None:
    """Of a row whose keys all have the bias: the one leaves its softmax, the other nothing."""
    q, k, v = heads(3, 7)
    with ops.backend(backend):
        low, gone = (ops.attention(torch.zeros_like(q), k, v, bias=torch.full((1, 1, 3, 7), b)) for b in (-1e4, -math.inf))
    assert error(low, v.repeat_interleave(2, 1).mean(2, keepdim=True).expand(2, 4, 3, 6)) < 1e-6
    assert (gone == 0).all()


# ---- core-facet


def turned(x: Tensor, position: Tensor) -> Tensor:
    """Rotated by half-split pairs; the test's own."""
    angle = position[:, None] * 10.0 ** -torch.arange(4, dtype=torch.float32)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@both
def test_core_facet_permuted_facets_permute_their_outputs_when_positions_restart(backend: ops.Backend) -> None:
    prefix, sizes = 21, [5, 3, 8]
    q, k, v = heads(prefix + sum(sizes))
    starts = [prefix, prefix + 5, prefix + 8]
    outputs = []
    for order in ([0, 1, 2], [2, 0, 1]):
        places = torch.cat([torch.arange(prefix), *(torch.arange(starts[f], starts[f] + sizes[f]) for f in order)])
        position = torch.cat([torch.arange(prefix), *(prefix + torch.arange(sizes[f]) for f in order)])  # each after the prefix
        ids = torch.cat([torch.zeros(prefix), *(torch.full((sizes[f],), f + 1.0) for f in order)]).long()[None]
        with ops.backend(backend):
            out = ops.attention(turned(q[:, :, places], position), turned(k[:, :, places], position), v[:, :, places],
                                mask=MaskProgram(masks.Causal(), masks.Segments(ids, shared=0)))
        outputs.append(torch.empty_like(out).index_copy_(2, places, out))
    assert error(outputs[1], outputs[0]) < 1e-6


@both
def test_core_facet_padding_on_the_left_is_no_key_of_anybody(backend: ops.Backend) -> None:
    q, k, v = heads(20)
    ids = torch.tensor([[0] * 12 + [1] * 4 + [2] * 4])
    pads = torch.full((2, 2, 5, 8), math.nan)
    exists = torch.arange(25)[None].expand(2, -1) >= 5
    with ops.backend(backend):
        alone = ops.attention(q, k, v, mask=MaskProgram(masks.Causal(), masks.Segments(ids, shared=0)))
        padded = ops.attention(torch.cat([q[:, :, :5], q], 2), torch.cat([pads, k], 2), torch.cat([pads[..., :6], v], 2),
                               mask=MaskProgram(masks.Causal(), masks.KeyPadding(exists),
                                                masks.Segments(torch.cat([torch.zeros(1, 5).long(), ids], 1), shared=0)))
    assert error(padded[:, :, 5:], alone) < 1e-6
    assert (padded[:, :, :5] == 0).all()  # a pad sees nothing, and is no average of the caption


# ---- core-infonce, core-siglip


def unit(n: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, 16), dim=1)


@both
def test_core_siglip_and_core_infonce_without_noise_are_the_plain_losses_bit_for_bit(backend: ops.Backend) -> None:
    """lambda = 0: no softening of any row. The twin of the plain losses is torch's cross-entropy, which rounds otherwise."""
    x, y, s, b = unit(70), unit(70), torch.tensor(2.3), torch.tensor(-3.0)
    noise = 0.0 * torch.rand(70)
    with ops.backend(backend):
        pairs = [
            (ops.contrastive_softmax(x, y, s, smoothing=(noise, noise)), ops.contrastive_softmax(x, y, s)),
            (ops.contrastive_sigmoid(x, y, s, b, labels=(1 - noise, noise)), ops.contrastive_sigmoid(x, y, s, b)),
        ]
    for soft, plain in pairs:
        for one, other in zip(soft, plain):
            if backend == "native":
                assert torch.equal(one, other)
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def growth(setting: str, step: str, warm: str, real: str) -> float:
    """MiB by which the peak of a process of its own grows between a small step and the real one."""
    script = f"""
import resource, torch
from vlm import ops
torch.set_num_threads(1)
{setting}
{step}
step({warm})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step({real})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    return float(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def test_core_ce_memory_is_that_of_a_chunk_and_not_of_all_logits() -> None:
    """1024 rows of 131072 ids are 512 MiB of logits; a chunk of 2^25 is 128, the table and its gradients 8 each."""
    step = """def step(n):
    hidden, labels = torch.randn(n, 16, requires_grad=True), torch.arange(n) * 100
    ops.linear_cross_entropy(hidden, weight, labels, reduction="mean").loss.backward()"""
    assert growth("weight = torch.randn(131072, 16, requires_grad=True)", step, "1", "1024") < 220


@pytest.mark.parametrize("size", [6144, pytest.param(32768, marks=pytest.mark.long)])
def test_core_infonce_memory_does_not_grow_with_all_pairs(size: int) -> None:
    """All logits of 6144 pairs are 144 MiB, of 32768 pairs 4 GiB; measured in a process of its own: what the peak grows by."""
    step = """def step(n):
    x, y = torch.randn(n, 64, requires_grad=True), torch.randn(n, 64, requires_grad=True)
    with ops.backend("native"):
        rows, columns = ops.contrastive_softmax(x, y, torch.zeros(()))
    (rows.sum() + columns.sum()).backward()"""
    grown = growth("", step, "8", str(size))
    assert grown < (30 if size < 10000 else 100)


# ---- hip


@both
@pytest.mark.parametrize("representative", ["first", "center"])
def test_hip_keys_that_no_query_of_the_block_sees_are_not_scored(backend: ops.Backend, representative: str) -> None:
    """Query i stands at i + 8: of the last keys of a block that some of the queries reach, others and the rest are beyond."""
    q, k = torch.ones(1, 1, 52, 4), torch.rand(1, 1, 60, 4)
    k[:, :, 20:24] += 9.0
    for block, future in ((0, slice(12, 60)), (6, slice(36, 60))):
        hot = k.clone()
        hot[:, :, future] = 1e6
        found = []
        for keys in (k, hot):
            with ops.backend(backend):
                blocks, _ = ops.select_hierarchical(q, keys, budget=8, block_q=4, block_k=8, window=0, sinks=0, row_step=1,
                                                    representative=representative)  # type: ignore[arg-type]
            found.append(blocks.index[0, 0, block])
        assert torch.equal(*found)


# ---- core-tome


@both
@pytest.mark.parametrize("order", ["sources-first", "position"])
def test_core_tome_tokens_of_unequal_numbers_of_copies_attend_as_the_copies_do(backend: ops.Backend, order: ops.MatchOrder) -> None:
    """Of 9 tokens three are there twice and one four times: sizes differ, so the logarithm of the size is needed."""
    distinct = torch.nn.functional.normalize(torch.randn(1, 9, 16), dim=-1)
    copies = distinct.repeat_interleave(torch.tensor([2, 2, 4, 2, 1, 1, 1, 1, 1]), 1)
    x, sizes = copies, None
    with ops.backend(backend):
        for r in (5, 1):  # pairs first; of the four copies then the two that are left
            x, sizes = ops.merge_tokens(x, sizes, ops.bipartite_match(x, r, 0, order="position" if r == 5 else order))
        assert sizes is not None
        assert sorted(sizes[0].tolist()) == [1, 1, 1, 1, 1, 2, 2, 2, 4]
        q = 4 * torch.randn(1, 1, 11, 16)
        whole = ops.attention(q, copies[:, None], copies[:, None])
        for bias in (ops.KeyBias(sizes.log()), sizes.log()[:, None, None]):
            assert error(ops.attention(q, x[:, None], x[:, None], bias=bias), whole) < 1e-5
        assert error(ops.attention(q, x[:, None], x[:, None]), whole) > 1e-2


# ---- filip


@both
def test_filip_a_patch_many_times_leaves_the_scores_of_words_bit_for_bit(backend: ops.Backend) -> None:
    v, w = (torch.nn.functional.normalize(torch.randn(5, n, 16), dim=-1) for n in (13, 7))
    for times in (2, 5):
        with ops.backend(backend):
            words = ops.late_interaction(v, w)[1]
            more = ops.late_interaction(torch.cat([v, v[:, 3:4].expand(-1, times - 1, -1)], 1), w)[1]
        if backend == "native":
            assert torch.equal(more, words)
        torch.testing.assert_close(more, words, rtol=1e-6, atol=1e-7)  # torch multiplies another shape in another order


def test_filip_the_gradient_is_that_of_the_best_pairs_and_of_finite_differences() -> None:
    v, w = (torch.nn.functional.normalize(torch.randn(3, n, 6, dtype=torch.float64), dim=-1).requires_grad_() for n in (5, 4))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 0, 0]], dtype=torch.bool)
    zi, zt = torch.randn(2, 3, 3, dtype=torch.float64)

    def value(v: Tensor, w: Tensor) -> Tensor:
        rows, columns = ops.late_interaction(v, w, mask_w=mask)
        return (zi * rows).sum() + (zt * columns).sum()

    assert torch.autograd.gradcheck(value, (v, w))
    got = torch.autograd.grad(value(v, w), (v, w))
    with ops.backend("native"):
        native = torch.autograd.grad(value(v.float(), w.float()), (v, w))
    want = [torch.zeros_like(v), torch.zeros_like(w)]
    with torch.no_grad():
        for i in range(3):
            for j in range(3):
                s = (v[i] @ w[j].T).masked_fill(~mask[j], -math.inf)
                for a in range(5):
                    b = int(s[a].argmax())
                    want[0][i, a] += zi[i, j] / 5 * w[j, b]
                    want[1][j, b] += zi[i, j] / 5 * v[i, a]
                for b in mask[j].nonzero()[:, 0].tolist():
                    a = int(s[:, b].argmax())
                    want[0][i, a] += zt[i, j] / int(mask[j].sum()) * w[j, b]
                    want[1][j, b] += zt[i, j] / int(mask[j].sum()) * v[i, a]
    for one, other, exact in zip(got, native, want):
        assert error(one, exact) < 1e-12
        assert error(other, exact) < 1e-5


# ---- tokenunify


@both
def test_tokenunify_what_stands_at_a_place_has_no_gradient_of_what_comes_after(backend: ops.Backend) -> None:
    """The causal backbones: the output at 20 of 33 positions, by chunks of 8."""
    x, delta, b, c = (torch.randn(1, 33, n, requires_grad=True) for n in (5, 5, 4, 4))
    q, k, v = (torch.randn(1, 2, 33, n, requires_grad=True) for n in (4, 4, 6))
    with ops.backend(backend):
        scanned = ops.ssm_scan(x, delta, -torch.rand(5, 4), b, c, torch.rand(5))[0]
        decayed = ops.linear_decay(q, k, v, -torch.rand(2), chunk=8)[0]
        attended = ops.attention(q, k, v, causal=True)
    for value, inputs, at in ((scanned[:, 20], (x, delta, b, c), 1), (decayed[:, :, 20], (q, k, v), 2), (attended[:, :, 20], (q, k, v), 2)):
        for gradient in torch.autograd.grad(value.square().sum(), inputs, retain_graph=True):
            assert (gradient.narrow(at, 21, 12) == 0).all()
            assert gradient.narrow(at, 0, 21).abs().sum() > 0
