"""Hierarchical attention step by step: tokens that are written share a choice for `refresh` steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.models.decoder_questions import states
from tests.models.model_makers import language, random_rows, rows_of
from vlm import ops
from vlm.attention import HierarchicalOptions
from vlm.attention.hierarchical import Choice
from vlm.models.far import ChosenCache
from vlm.ops.selection import dense_mask

both = pytest.mark.parametrize("backend", ["native", "torch"])
SHAPES = pytest.mark.parametrize(("block_k", "window", "sinks"), [(1, 3, 1), (2, 4, 3), (4, 0, 0), (3, 7, 2)])


def drawn(length: int, seed: int = 0) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, width, generator=g) for heads, width in ((4, 8), (2, 8), (2, 6))]


@both
@SHAPES
def test_hip_a_refresh_of_1_is_a_choice_for_every_token(backend: ops.Backend, block_k: int, window: int, sinks: int) -> None:
    core = HierarchicalOptions(k=4 * block_k, block_k=block_k, window=window, sinks=sinks, refresh=1).build()
    q, k, v = drawn(60)
    kept = None
    with ops.backend(backend), torch.no_grad():
        for t in range(30, 60):
            one, keys, values = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
            got, kept = core.step(one, keys, values, kept)
            assert torch.equal(got, core(one, keys, values))


@both
@SHAPES
def test_hip_a_shared_choice_is_its_list_and_every_block_begun_since(backend: ops.Backend, block_k: int, window: int, sinks: int) -> None:
    """The list of the step that chose, and the keys behind it, in float64 by their definition."""
    refresh = 5
    core = HierarchicalOptions(k=4 * block_k, block_k=block_k, window=window, sinks=sinks, refresh=refresh).build()
    q, k, v = drawn(60)
    kept, chose = None, []
    for t in range(30, 60):
        one, keys, values = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
        if (t - 30) % refresh == 0:
            listed, held = dense_mask(core.choose(one, keys), 1, t + 1), t + 1
        allow = torch.nn.functional.pad(listed, (0, t + 1 - listed.shape[3]))
        begun = torch.arange(t + 1) // block_k
        allow = allow | (begun >= -(-held // block_k))
        same = listed[..., -1:] & (begun == (held - 1) // block_k)  # the rest of a block that is listed
        logits = (one.double() @ keys.double().repeat_interleave(2, 1).mT / math.sqrt(8)).masked_fill(~(allow | same), -math.inf)
        want = logits.softmax(-1) @ values.double().repeat_interleave(2, 1)
        with ops.backend(backend), torch.no_grad():
            got, kept = core.step(one, keys, values, kept)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)
        assert kept is not None
        chose.append(kept.keys)
    assert chose == [31 + (t // refresh) * refresh for t in range(30)]


@both
def test_hip_a_shared_choice_of_all_keys_is_dense_attention(backend: ops.Backend) -> None:
    core = HierarchicalOptions(k=100, block_k=2, window=3, sinks=1, refresh=7).build()
    q, k, v = drawn(50)
    kept = None
    with ops.backend(backend), torch.no_grad():
        for t in range(10, 50):
            one, keys, values = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
            got, kept = core.step(one, keys, values, kept)
            torch.testing.assert_close(got, ops.attention(one, keys, values, causal=True), rtol=1e-5, atol=2e-6)


def test_hip_several_queries_leave_no_choice_and_rows_that_chose_apart_choose_anew() -> None:
    core = HierarchicalOptions(k=4, block_k=1, window=3, sinks=1, refresh=4).build()
    q, k, v = drawn(40)
    with torch.no_grad():
        _, kept = core.step(q[:, :, 29:30], k[:, :, :30], v[:, :, :30], None)
        got, after = core.step(q[:, :, 30:32], k[:, :, :32], v[:, :, :32], kept)
        assert after is None
        assert torch.equal(got, core(q[:, :, 30:32], k[:, :, :32], v[:, :, :32]))
        _, later = core.step(q[:, :, 32:33], k[:, :, :33], v[:, :, :33], None)
    assert kept is not None
    assert later is not None
    assert Choice.joined([kept.row(0), later.row(1)]) is None
    assert Choice.joined([kept.row(0), None]) is None
    joined = Choice.joined([kept.row(0), kept.row(1)])
    assert joined is not None
    assert torch.equal(joined.index, kept.index)


@torch.no_grad()
def test_hip_a_decoder_keeps_a_choice_for_its_steps_and_none_for_a_refresh_of_1() -> None:
    """Ragged rows, whose choices are their own; the caches of a refresh of 1 hold keys and values alone."""
    table = dict(kind="hierarchical", k=4, block_q=4, block_k=1, window=3, sinks=1)
    shared, anew = language(attention=table | {"refresh": 3}), language(attention=table | {"refresh": 1})
    stream = rows_of(random_rows([31, 22]), side="left")
    one, other = (states(m, stream, keep_cache=True).cache for m in (shared, anew))
    apart = []
    for step in range(7):
        more = rows_of([[9 + step], [20 + step]])
        a, b = states(shared, more, cache=one), states(anew, more, cache=other)
        one, other = a.cache, b.cache
        assert isinstance(one, ChosenCache)
        assert not isinstance(other, ChosenCache)
        for layer in one.choices:
            assert [(choice.keys, choice.steps) for choice in layer if choice] == [(n + step // 3 * 3 + 1, step % 3 + 1) for n in (31, 22)]
        apart.append(not torch.allclose(a.x, b.x, atol=1e-5))
    assert apart[0] is False  # both have just chosen
    assert any(apart[1:])


@torch.no_grad()
def test_hip_a_row_that_reads_nothing_keeps_its_choice() -> None:
    table = dict(kind="hierarchical", k=4, block_q=4, block_k=1, window=3, sinks=1, refresh=4)
    model, lists = language(attention=table), random_rows([31, 22])
    cache = states(model, rows_of(lists), keep_cache=True).cache
    cache = states(model, rows_of([[9], [20]]), cache=cache).cache
    halted = states(model, rows_of([[10], []]), cache=cache).cache
    assert [choice.steps for choice in halted.choices[0]] == [2, 1]
    alone = states(model, rows_of([[11], [21]]), cache=halted).x
    straight = states(model, rows_of([[0], [21]]), cache=cache).x
    assert torch.allclose(alone[1], straight[1], atol=1e-5)
