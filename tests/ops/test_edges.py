"""Edges of the contracts: widths of 0, biases as low as float32 has them, autocast, ids beyond 32 bits, broken tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.ops import masks

BACKENDS = ("native", "torch")
LOWEST = torch.finfo(torch.float32).min


def all_keys(batch: int, heads: int, queries: int, keys: int, block: int = 4) -> ops.BlockList:
    lists, blocks = -(-queries // block), -(-keys // block)
    index = torch.arange(blocks, dtype=torch.int32).expand(batch, heads, lists, blocks).contiguous()
    return ops.BlockList(index, torch.full((batch, heads, lists), blocks, dtype=torch.int32), block, block)


# ---- width 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_heads_of_width_0_attend_evenly(backend: ops.Backend) -> None:
    q, k, v = torch.randn(2, 4, 5, 0), torch.randn(2, 2, 7, 0), torch.randn(2, 2, 7, 3, requires_grad=True)
    even = v.detach().mean(2, keepdim=True).repeat_interleave(2, 1).expand(-1, -1, 5, -1)
    with ops.backend(backend):
        out, lse = ops.attention(q, k, v, return_lse=True)
        torch.testing.assert_close(ops.attention(q, k, v), even)
        torch.testing.assert_close(ops.attention_row_statistics(q, k).entropy, torch.full((2, 4, 5), math.log(7)))
        torch.testing.assert_close(ops.attention_column_sums(q, k), torch.full((2, 4, 7), 5 / 7))
        torch.testing.assert_close(ops.attention_rows(q, k, torch.tensor([0, 4])), torch.full((2, 4, 2, 7), 1 / 7))
        torch.testing.assert_close(ops.attention_columns(q, k, torch.tensor([1, 6])), torch.full((2, 4, 5, 2), 1 / 7))
        out.sum().backward()
    torch.testing.assert_close(out, even)
    torch.testing.assert_close(lse, torch.full((2, 4, 5), math.log(7)))
    torch.testing.assert_close(v.grad, torch.full_like(v, 10 / 7))


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_sparse_heads_of_width_0_attend_evenly(backend: ops.Backend) -> None:
    q, k, v = torch.randn(1, 2, 5, 0), torch.randn(1, 2, 5, 0), torch.randn(1, 2, 5, 3)
    with ops.backend(backend):
        out = ops.block_sparse_attention(q, k, v, all_keys(1, 2, 5, 5))
        chosen, _ = ops.select_hierarchical(q, k, budget=2, window=1, sinks=1)
    torch.testing.assert_close(out, v.cumsum(2) / torch.arange(1, 6)[:, None])
    assert (chosen.count > 0).all()


def test_packed_sequences_of_width_0() -> None:
    starts = torch.tensor([0, 2, 5])
    v = torch.randn(5, 2, 3)
    out = ops.attention_varlen(torch.randn(5, 2, 0), torch.randn(5, 2, 0), v, starts)
    torch.testing.assert_close(out[:2], v[:2].mean(0).expand(2, -1, -1))


# ---- biases that are low, but finite


def results(inputs: list[Tensor], bias: Tensor, backend: ops.Backend) -> list[Tensor | None]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    with ops.backend(backend):
        out = ops.attention(*leaves, bias=bias)
    out.backward(torch.arange(out.shape[3]).to(out.dtype).expand_as(out))
    return [out.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1e4, -1e9, -2.3e38, LOWEST])
def test_a_row_of_low_biases_is_an_average_and_no_empty_row(backend: ops.Backend, low: float) -> None:
    """In float32 what differs by less than a last bit of 1e9 is equal, in float64 beside the lowest float32."""
    given = [torch.randn(s) for s in ((1, 2, 5, 8), (1, 2, 70, 8), (1, 2, 70, 6))]
    place = torch.zeros(1, 1, 5, 70)
    place[:, :, 1] = place[:, :, 2, 3:] = place[:, :, 3, :69] = 1
    expected = results([t.double() for t in given], place.double() * (low if low == -1e4 else LOWEST), "torch")
    for got, want in zip(results(given, place * low, backend), expected):
        assert got is not None
        assert want is not None
        torch.testing.assert_close(got.double(), want, atol=2e-3 if low == -1e4 else 1e-4, rtol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_biases_by_position_average_too(backend: ops.Backend) -> None:
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 6, 8), torch.randn(1, 1, 6, 4)
    bias = ops.BucketBias(torch.full((4, 1), LOWEST), bidirectional=False, max_distance=8)
    with ops.backend(backend):
        torch.testing.assert_close(ops.attention(q, k, v, bias=bias), v.mean(2, keepdim=True))
        torch.testing.assert_close(ops.attention(q, k, v, bias=bias, return_lse=True)[0], v.mean(2, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1e9, LOWEST])
def test_statistics_of_low_biases(backend: ops.Backend, low: float) -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 140, 8)
    bias = torch.zeros(1, 1, 3, 140)
    bias[:, :, 1] = low
    bias[:, :, 2, :70] = low
    p = torch.softmax(q @ k.repeat_interleave(2, 1).mT / math.sqrt(8) + bias, -1)
    with ops.backend(backend):
        torch.testing.assert_close(ops.attention_column_sums(q, k, bias=bias), p.sum(2))
        lse = ops.attention_lse(q, k, bias=bias)
        torch.testing.assert_close(ops.attention_column_sums(q, k, bias=bias, lse=lse), p.sum(2))
        torch.testing.assert_close(ops.attention_rows(q, k, torch.tensor([1, 2]), bias=bias), p[:, :, 1:])
        assert lse.isfinite().all()
        entropy = ops.attention_entropy(q, k, bias=bias)
    torch.testing.assert_close(entropy, torch.special.entr(p).sum(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_pagerank_of_a_row_of_low_biases(backend: ops.Backend) -> None:
    q = torch.randn(1, 1, 6, 8)
    bias = torch.zeros(1, 1, 6, 6)
    bias[:, :, 2] = LOWEST
    with ops.backend(backend):
        torch.testing.assert_close(ops.attention_pagerank(q, q, bias=bias).sum(-1), torch.ones(1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_block_sparse_attention_averages_over_low_biases(backend: ops.Backend) -> None:
    q, k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 3)
    with ops.backend(backend):
        out = ops.block_sparse_attention(q, k, v, all_keys(1, 2, 5, 5), bias=torch.full((1, 1, 5, 5), LOWEST))
    torch.testing.assert_close(out, v.cumsum(2) / torch.arange(1, 6)[:, None])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_low_bias_stays_finite_where_it_is_narrowed(backend: ops.Backend, dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(1, 1, 3, 8).to(dtype) for _ in range(3))
    with ops.backend(backend):
        out = ops.attention(q, k, v, bias=torch.full((1, 1, 3, 3), LOWEST))
        again, _ = ops.attention(q, k, v, bias=torch.full((1, 1, 3, 3), LOWEST), return_lse=True)
    for got in (out, again) if (backend, dtype) != ("torch", torch.float16) else (again,):
        torch.testing.assert_close(got, v.mean(2, keepdim=True).expand_as(got), atol=2e-2, rtol=2e-2)
    assert out.any(-1).all()  # torch adds -65504 in float16, beside which products do not vanish: no average, but no empty row


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_exact_attention_infinite_biases_remove_beside_low_ones(backend: ops.Backend) -> None:
    q, k, v = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 3)
    bias = torch.tensor([-math.inf, LOWEST, LOWEST, -math.inf]).reshape(1, 1, 1, 4)
    with ops.backend(backend):
        torch.testing.assert_close(ops.attention(q, k, v, bias=bias), v[:, :, 1:3].mean(2, keepdim=True))
        assert not ops.attention(q, k, v, bias=torch.full_like(bias, -math.inf)).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1e9, LOWEST])
def test_merged_parts_of_low_biases_are_shared_evenly(backend: ops.Backend, low: float) -> None:
    outs = [torch.randn(1, 1, 2, 3, requires_grad=True) for _ in range(2)]
    lses = [torch.full((1, 1, 2), low), torch.full((1, 1, 2), low)]
    with ops.backend(backend):
        out, _ = ops.merge_attention(*zip(outs, lses))
        out.sum().backward()
    torch.testing.assert_close(out, (outs[0] + outs[1]) / 2)
    for t in outs:
        torch.testing.assert_close(t.grad, torch.full_like(t, 0.5))


def test_statistics_of_cooled_low_biases_stay_finite() -> None:
    q = torch.randn(1, 1, 3, 8)
    for backend in BACKENDS:
        with ops.backend(backend):  # type: ignore[arg-type]
            p = ops.attention_rows(q, q, torch.arange(3), bias=torch.full((1, 1, 3, 3), LOWEST), temperature=0.1)
        torch.testing.assert_close(p, torch.full_like(p, 1 / 3))


# ---- autocast


def attends() -> dict[str, Callable[[], Tensor]]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    learns = q.clone().requires_grad_()
    starts = torch.tensor([0, 5])
    packed = [t[0].transpose(0, 1) for t in (q, k, v)]
    lists = all_keys(1, 2, 5, 5)
    return {
        "attention": lambda: ops.attention(q, k, v),
        "attention with mixed types": lambda: ops.attention(q.bfloat16(), k, v),
        "attention with lse": lambda: ops.attention(q, k, v, return_lse=True)[0],
        "attention_varlen": lambda: ops.attention_varlen(*packed, starts),
        "block_sparse_attention": lambda: ops.block_sparse_attention(q, k, v, lists),
        "block_sparse_attention that learns": lambda: ops.block_sparse_attention(learns, k, v, lists),
        "block_sparse_attention with mixed types": lambda: ops.block_sparse_attention(q.bfloat16(), k, v, lists),
        "linear_decay": lambda: ops.linear_decay(q, k, v, -torch.ones(2))[0],
        "window_attention": lambda: ops.window_attention(torch.randn(1, 4, 4, 12), torch.ones(2), torch.zeros(9, 2), window=2),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", attends())
def test_autocast_gives_the_type_that_torch_gives(name: str, backend: ops.Backend) -> None:
    call = attends()[name]
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        like = F.scaled_dot_product_attention(*(torch.randn(1, 1, 2, 4) for _ in range(3)))
        assert call().dtype == like.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses_and_scores_are_float32_under_autocast(backend: ops.Backend) -> None:
    x, y, h, w = torch.randn(4, 8), torch.randn(4, 8), torch.randn(6, 8), torch.randn(9, 8)
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    scale = torch.tensor(1.0)
    with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
        found = {
            "softmax": torch.stack(ops.contrastive_softmax(x, y, scale)),
            "sigmoid": torch.stack(ops.contrastive_sigmoid(x, y, scale, scale)),
            "cross entropy": ops.linear_cross_entropy(h, w, torch.arange(6)).loss,
            "distillation": ops.linear_distillation(h, w, teacher_logits=torch.randn(6, 9)),
            "alignment": ops.sequence_alignment(torch.rand(2, 4, 5), gamma=0.1),
            "late interaction": ops.late_interaction(torch.randn(2, 3, 8), torch.randn(3, 4, 8))[0],
            "column sums": ops.attention_column_sums(q, k),
            "entropy": ops.attention_entropy(q, k),
            "lse": ops.attention(q, k, k, return_lse=True)[1],
            "mutual": ops.mutual_guided(torch.randn(2, 3, 8), torch.randn(3, 4, 8)),
        }
    assert {name: t.dtype for name, t in found.items()} == dict.fromkeys(found, torch.float32)


# ---- ids beyond 32 bits


def test_ids_beyond_32_bits_are_refused_where_they_would_collide() -> None:
    ids = torch.tensor([[1, 1 + 2**32, 1, 1 + 2**32]])
    small = ids % 7
    for make in (lambda: masks.Segments(ids), lambda: masks.Spans(ids), lambda: masks.TileTags(small, ids),
                 lambda: masks.Segments(small, -ids), lambda: masks.Segments(small, shared=2**33),
                 lambda: masks.Rows(torch.tensor([[[0, 2**40]] * 4])),
                 lambda: masks.BlockList(ids[None, None], torch.ones(1, 1, 1, dtype=torch.int64), 4, 1)):
        with pytest.raises(ValueError, match="32 bits"):
            make()


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_at_the_ends_of_32_bits_work(backend: ops.Backend) -> None:
    q = torch.randn(1, 1, 4, 8)
    ids = torch.tensor([[2**31 - 1, -(2**31), 2**31 - 1, -(2**31)]])
    with ops.backend(backend):
        out = ops.attention(q, q, q, mask=masks.Segments(ids))
        torch.testing.assert_close(out[:, :, ::2], ops.attention(q[:, :, ::2], q[:, :, ::2], q[:, :, ::2]))


# ---- tensors that do not belong together


@pytest.mark.parametrize("backend", ["auto", "native", "torch"])
def test_tensors_of_two_devices_are_refused_before_an_address_is_read(backend: ops.Backend) -> None:
    """Meta tensors have no address at all: the kernels would take that for a mask that is not given."""
    q, tokens, x = torch.randn(1, 2, 5, 8), torch.randn(2, 3, 8), torch.randn(4, 8)
    away = {"device": "meta"}
    keep, ids = torch.ones(1, 5, dtype=torch.bool, **away), torch.zeros(1, 5, dtype=torch.int64, **away)  # type: ignore[call-overload]
    one = torch.tensor(1.0)
    calls: list[Callable[[], object]] = [
        lambda: ops.attention(q, q, q, key_mask=keep),
        lambda: ops.attention(q, q, q.to("meta")),
        lambda: ops.attention_lse(q, q, key_mask=keep),
        lambda: ops.attention_column_sums(q, q, weights=torch.ones(1, 2, 5, **away)),  # type: ignore[call-overload]
        lambda: ops.late_interaction(tokens, tokens, mask_v=torch.ones(2, 3, dtype=torch.bool, **away)),  # type: ignore[call-overload]
        lambda: ops.mutual_guided(tokens, tokens, mask_v=torch.ones(2, 3, dtype=torch.bool, **away)),  # type: ignore[call-overload]
        lambda: ops.contrastive_softmax(x, x, one, groups_x=torch.arange(4, **away)),  # type: ignore[call-overload]
        lambda: ops.contrastive_sigmoid(x, x.to("meta"), one, one),
        lambda: ops.gather_tokens(tokens, torch.zeros(2, 2, dtype=torch.int64, **away)),  # type: ignore[call-overload]
        lambda: ops.scatter_tokens(tokens, torch.zeros(2, 3, dtype=torch.int64, **away), 4),  # type: ignore[call-overload]
        lambda: ops.linear_cross_entropy(x, x.to("meta"), torch.arange(4)),
    ]
    if backend != "torch":  # the twin reads no addresses: torch refuses
        calls.append(lambda: ops.attention(q, q, q, mask=masks.Segments(ids), return_lse=True))
    for call in calls:
        with ops.backend(backend), pytest.raises(ValueError, match="one device"):
            call()


def test_masks_of_mutual_guided_similarity_must_fit() -> None:
    tokens = torch.randn(2, 3, 8)
    for mask in (torch.ones(2, 4, dtype=torch.bool), torch.ones(2, 3), torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="masks must be bool"):
            ops.mutual_guided(tokens, tokens, mask_v=mask)


def test_a_scan_refuses_integers() -> None:
    x, b = torch.randn(1, 4, 2), torch.randn(1, 4, 3)
    for at in range(3):
        given = [x, x, -torch.ones(2, 3)]
        given[at] = given[at].long()
        with pytest.raises(ValueError, match="floating"):
            ops.ssm_scan(*given, b, b, torch.ones(2))


# ---- nothing at all


@pytest.mark.parametrize("backend", BACKENDS)
def test_focus_of_no_tokens(backend: ops.Backend) -> None:
    with ops.backend(backend):
        focus = ops.attention_focus(torch.randn(2, 3, 0, 8), torch.randn(2, 3, 0, 8))
    assert focus.received.shape == focus.paid.shape == focus.score.shape == (2, 0)
    assert focus.by_received.shape == (2,)


# ---- what is broken, or removed


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("known", [True, False])
def test_core_filip_broken_tokens_break_the_gradients_they_meet(side: int, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not known:
        monkeypatch.setattr("vlm.ops.late_interaction_native.FOUND_LIMIT", 0)
    given = [torch.randn(3, 4, 10), torch.randn(2, 5, 10)]
    given[side][1, 2, 3] = math.nan
    for both in (False, True):
        if both:
            given[1 - side][0, 1, 4] = math.nan
        for use in (0, 1):  # rows, or columns
            found = []
            for backend in BACKENDS:
                leaves = [t.clone().requires_grad_() for t in given]
                with ops.backend(backend):  # type: ignore[arg-type]
                    ops.late_interaction(*leaves)[use].sum().backward()
                found.append([t.grad for t in leaves])
            for got, want in zip(*found):
                assert got is not None
                assert want is not None
                torch.testing.assert_close(got, want, equal_nan=True)
            assert any(g.isnan().any() for g in found[0])  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filling", [math.nan, math.inf])
def test_windows_know_nothing_of_one_another(backend: ops.Backend, filling: float) -> None:
    """Shifted windows hold positions of two sides of the map, which do not see one another, whatever they hold."""
    torch.manual_seed(1)
    clean = torch.randn(1, 8, 8, 3 * 2 * 4)
    dirty = clean.clone()
    dirty[:, 0, 0] = filling
    tau, table = torch.ones(2), torch.randn(49, 2)
    found = []
    for qkv in (clean, dirty):
        leaf = qkv.clone().requires_grad_()
        with ops.backend(backend):
            out = ops.window_attention(leaf, tau, table, window=4, shift=2)
        # The gradient of what the broken position does not meet.
        reached = out.detach().isfinite()
        torch.where(reached, out, 0.0).sum().backward()
        found.append((out.detach(), leaf.grad))
    broken = ~found[1][0].isfinite().all(-1)
    assert broken[0, 0, 0]
    assert broken.sum() <= 4
    torch.testing.assert_close(found[1][0][~broken], found[0][0][~broken])
    assert found[1][1] is not None
    assert found[0][1] is not None
    torch.testing.assert_close(found[1][1][~broken], found[0][1][~broken])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_broken_state_reaches_only_the_document_it_belongs_to(backend: ops.Backend, chunk: int) -> None:
    torch.manual_seed(1)
    given = [torch.randn(1, 2, 12, 8) for _ in range(3)]
    segment = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    found = []
    for filling in (0.0, math.nan):
        leaves = [t.clone().requires_grad_() for t in (*given, torch.full((1, 2, 8, 8), filling))]
        with ops.backend(backend):
            out, last = ops.linear_decay(*leaves[:3], torch.tensor([-0.1, -0.7]), state=leaves[3], segment=segment, chunk=chunk)
        (out[:, :, 5:].sum() + last.sum()).backward()
        found.append([out.detach()[:, :, 5:], last.detach(), *(t.grad[:, :, 5:] for t in leaves[:3]), leaves[3].grad])  # type: ignore[index]
    for got, want in zip(found[1], found[0]):
        torch.testing.assert_close(got, want)


# ---- derivatives that are no backward


def derived() -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor]]:
    torch.manual_seed(2)
    k, w = torch.randn(1, 2, 7, 8), torch.randn(2, 5, 8)
    index = torch.tensor([[0, 2, -1]])
    one = torch.tensor(1.0)
    return {
        "attention": (lambda q: ops.attention(q, k, k, return_lse=True)[0], torch.randn(1, 2, 5, 8)),
        "linear_decay": (lambda q: ops.linear_decay(q, k, k, -torch.ones(2))[0], torch.randn(1, 2, 7, 8)),
        "window_attention": (lambda x: ops.window_attention(x, torch.ones(2), torch.zeros(9, 2), window=2), torch.randn(1, 4, 4, 12)),
        "merge_attention": (lambda x: ops.merge_attention((x, k[..., 0]), (k, k[..., 1]))[0], torch.randn(1, 2, 7, 8)),
        "late_interaction": (lambda v: ops.late_interaction(v, w)[0], torch.randn(3, 4, 8)),
        "contrastive_softmax": (lambda x: ops.contrastive_softmax(x, w[0], one)[0], torch.randn(5, 8)),
        "sequence_alignment": (lambda c: ops.sequence_alignment(c, gamma=0.1), torch.randn(2, 5, 6)),
        "gather_tokens": (lambda x: ops.gather_tokens(x, index), torch.randn(1, 4, 16)),
        "scatter_tokens": (lambda x: ops.scatter_tokens(x, index, 5), torch.randn(1, 3, 16)),
    }


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own forward mode compiles with it
@pytest.mark.parametrize("name", derived())
def test_forward_mode_and_functional_gradients_are_never_quietly_zero(name: str) -> None:
    call, x = derived()[name]
    leaf = x.clone().requires_grad_()
    call(leaf).sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda t: call(t).sum())(x), leaf.grad)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(call, (x,), (direction,))
    torch.testing.assert_close(tangent.sum(), (direction * leaf.grad).sum(), atol=1e-3, rtol=1e-3)
    with ops.backend("native"), pytest.raises(ValueError, match="forward-mode"):
        torch.func.jvp(call, (x,), (direction,))


@pytest.mark.parametrize("name", [n for n in derived() if n not in ("gather_tokens", "scatter_tokens")])
def test_second_derivatives_are_refused(name: str) -> None:
    call, x = derived()[name]
    leaf = x.clone().requires_grad_()
    with ops.backend("native"):
        gradient, = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            gradient.sum().backward()
