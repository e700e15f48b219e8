"""The native block memory against its twin, against exact attention, and against itself in pieces."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error
from vlm import ops
from vlm.attention.block_memory import BlockMemory, BlockMemoryOptions, MemoryState
from vlm.ops.block_memory import MemoryRead, MemoryShape, block_memory
from vlm.ops.block_memory_native import native_block_memory
from vlm.ops.block_memory_reference import Far

SMALL = MemoryShape(n_init=3, n_local=20, block=5, topk=3, representatives=2, chunk=7)


def row(length: int, heads: int = 4, groups: int = 2, width: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, length, width, generator=generator) for n in (heads, groups, groups)]


def read(q: Tensor, k: Tensor, v: Tensor, shape: MemoryShape, backend: ops.Backend = "native") -> MemoryRead:
    """A whole row at once."""
    with ops.backend(backend):
        return block_memory(q, k, v, q.new_zeros(q.shape[0], 0), q.new_zeros(q.shape[0], 0, q.shape[2]), shape=shape)


def in_pieces(q: Tensor, k: Tensor, v: Tensor, memory: BlockMemory, edges: list[int]) -> tuple[Tensor, MemoryState]:
    state = memory.start(q.shape[0], k.shape[0], q.shape[2], like=q)
    outs = [memory(q[:, a:b], k[:, a:b], v[:, a:b], state) for a, b in itertools.pairwise([0, *edges, q.shape[1]])]
    return torch.cat(outs, 1), state


def same(got: MemoryRead, exact: MemoryRead) -> None:
    """Choices equal, the rest near."""
    assert torch.equal(got.chosen, exact.chosen)
    for a, b in ((got.out, exact.out), (got.score, exact.score), (got.means, exact.means)):
        assert a.shape == b.shape
        assert b.numel() == 0 or error(a, b.double()) < 3e-6


@pytest.mark.parametrize("far", ["fixed", "absolute"])
@pytest.mark.parametrize(("length", "heads", "groups", "width"), [(1, 1, 1, 2), (97, 4, 2, 8), (300, 3, 1, 34), (131, 2, 2, 64)])
def test_core_infllm_native_equals_the_twin(length: int, heads: int, groups: int, width: int, far: Far, level: str) -> None:
    q, k, v = row(length, heads, groups, width)
    shape = replace(SMALL, far=far)
    got = read(q, k, v, shape)
    same(got, read(q.double(), k.double(), v.double(), shape, "torch"))
    same(got, read(q, k, v, shape, "torch"))
    assert (got.chosen[:, 1:] > got.chosen[:, :-1]).logical_or(got.chosen[:, 1:] < 0).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_core_infllm_native_equals_the_twin_on_any_sizes(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    groups, length, n_local = number(1, 2), number(0, 90), number(1, 30)
    q, k, v = row(length, groups * number(1, 3), groups, 2 * number(1, 20), seed=number(0, 99))
    shape = MemoryShape(number(0, 9), n_local, number(1, 9), number(0, 6), number(1, 4), number(1, n_local),
                        data.draw(st.sampled_from(["fixed", "absolute"])))
    exact = read(q.double(), k.double(), v.double(), shape, "torch")
    got = read(q, k, v, shape)
    if torch.equal(got.chosen, exact.chosen) and error(got.means, exact.means) < 1e-5:
        same(got, exact)
    else:  # two scores were nearly equal: then float32 in torch is no better a judge
        assert got.chosen.shape == exact.chosen.shape


@pytest.mark.parametrize("far", ["fixed", "absolute"])
def test_core_infllm_native_within_the_window_is_exact_attention(far: Far, level: str) -> None:
    q, k, v = row(150, width=16)
    position = torch.arange(150)
    shape = MemoryShape(4, 150, 8, 2, 2, 40, far)
    angle = position[:, None] * 10000.0 ** -(torch.arange(0, 16, 2) / 16)
    cos, sin = torch.cat([angle.cos()] * 2, 1), torch.cat([angle.sin()] * 2, 1)
    turned = [x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k)]
    exact = ops.attention(turned[0][None], turned[1][None], v[None], causal=True)[0]
    assert error(read(q, k, v, shape).out, exact.double()) < 5e-6
    # All blocks at their true distances see every key too, whatever the window.
    everything = MemoryShape(4, 16, 8, 100, 2, 5, "absolute")
    assert error(read(q, k, v, everything).out, exact.double()) < 5e-6


@pytest.mark.parametrize("edges", [[1], [64, 64, 65], list(range(100, 150))])
def test_core_infllm_native_reads_on_and_writes_step_by_step(edges: list[int]) -> None:
    options = BlockMemoryOptions(n_init=3, n_local=20, block=5, topk=3, representatives=2, chunk=7)
    q, k, v = row(150)
    got, state = in_pieces(q, k, v, options.build(), edges)
    exact, wanted = in_pieces(q.double(), k.double(), v.double(), options.build(), edges)
    assert error(got, exact) < 3e-6
    assert error(state.means, wanted.means) < 3e-6
    assert error(state.score, wanted.score) < 3e-6
    assert state.loads == 0 < wanted.loads  # natively blocks are read where they lie
    assert not state.held


def test_a_copied_state_is_read_on_without_the_other() -> None:
    memory = BlockMemoryOptions(n_init=3, n_local=20, block=5, topk=3, representatives=2, chunk=7).build()
    q, k, v = row(120)
    state = in_pieces(q[:, :100], k[:, :100], v[:, :100], memory, [])[1]
    other, before = state.copy(), [t.clone() for t in (state.keys, state.score, state.means)]
    first = memory(q[:, 100:], k[:, 100:], v[:, 100:], other)
    assert all(torch.equal(a, b) for a, b in zip(before, (state.keys, state.score, state.means)))
    assert torch.equal(memory(q[:, 100:], k[:, 100:], v[:, 100:], state), first)


def test_of_equal_blocks_the_earlier_is_chosen_and_of_equal_tokens_too(level: str) -> None:
    q, k, v = (torch.zeros(2, 60, 4), torch.zeros(1, 60, 4), torch.zeros(1, 60, 4))
    k[..., 0] = torch.arange(60) * 1.0  # queries of 0: every weight is the same, every block fits as well
    shape = MemoryShape(n_init=2, n_local=10, block=4, topk=2, representatives=2, chunk=1)
    for backend in ("native", "torch"):
        got = read(q, k, v, shape, backend)
        assert got.chosen[-1].tolist() == [0, 1]
        # 20 scores of the call are equal where rounding is: what a token got in the window is 10 like numbers, summed alike.
        places = 2 + 4 * torch.arange(got.means.shape[1])
        assert ((got.means[0, :, 0] >= places) & (got.means[0, :, 0] <= places + 3)).all()


def test_a_planted_block_is_found(level: str) -> None:
    q, k, v = row(400)
    k[:, 103:108] = 6.0
    q[:, 393:] = 6.0
    assert int(read(q, k, v, replace(SMALL, topk=1, n_local=14)).chosen[-1]) == 20


def test_numbers_beyond_the_row_mean_all_of_it() -> None:
    q, k, v = row(90)
    huge = 2**62
    exact = read(q, k, v, MemoryShape(0, 90, 1, 0, 1, 90)).out
    assert torch.equal(read(q, k, v, MemoryShape(0, 91, huge, huge, huge, 90)).out, exact)
    wide = MemoryShape(huge, 20, 5, 3, 2, 7)
    same(read(q, k, v, wide), read(q, k, v, wide, "torch"))


def test_half_precision_is_read_in_torch_unless_told_otherwise() -> None:
    q, k, v = (t.bfloat16() for t in row(60))
    own, told = read(q, k, v, replace(SMALL, topk=100), "auto"), read(q, k, v, replace(SMALL, topk=100))
    assert own.out.dtype == told.out.dtype == torch.bfloat16
    assert torch.equal(own.out, read(q, k, v, replace(SMALL, topk=100), "torch").out)
    assert error(told.out, own.out.double()) < 0.1


@pytest.mark.parametrize("change", [dict(q=torch.zeros(3, 7, 8)), dict(q=torch.zeros(4, 61, 8)), dict(score=torch.zeros(4, 3)),
                                    dict(score=torch.zeros(4, 54)), dict(means=torch.zeros(4, 7, 8)), dict(score=torch.zeros(4, 53).double()),
                                    dict(keys=torch.zeros(2, 60, 7), values=torch.zeros(2, 60, 7), q=torch.zeros(4, 7, 7))])
def test_what_does_not_fit_is_refused(change: dict[str, Tensor]) -> None:
    q, keys, values = row(60)
    inputs = dict(q=q[:, :7], keys=keys, values=values, score=torch.zeros(4, 53), means=torch.zeros(4, 0, 8))
    block_memory(**inputs, shape=SMALL)
    with pytest.raises(ValueError, match="block memory"):
        block_memory(**(inputs | change), shape=SMALL)


def test_opcheck_behind_a_cache() -> None:
    q, k, v = row(60)
    torch.library.opcheck(native_block_memory, (q[:, :7], k, v, torch.rand(4, 53), torch.rand(4, 2, 8), 3, 20, 5, 3, 2, 7, True, 100.0))
