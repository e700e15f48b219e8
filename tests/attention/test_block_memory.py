"""Block memory against full attention, against a window with sinks, and against itself with another cache."""

import itertools

import pytest
import torch
from pydantic import ValidationError

from vlm.attention.block_memory import BlockMemoryOptions

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def row(length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, length, WIDTH), (KV_HEADS, length, WIDTH), (KV_HEADS, length, WIDTH))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def read(options, q, k, v, pieces=()):
    """The whole row, in calls that end at `pieces`."""
    memory = options.build()
    state = memory.start(HEADS, KV_HEADS, WIDTH, like=q)
    edges = [0, *pieces, q.shape[1]]
    outs = [memory(q[:, a:b], k[:, a:b], v[:, a:b], state) for a, b in itertools.pairwise(edges)]
    return torch.cat(outs, 1), state


def oracle(q, k, v, allow, distance):
    """Softmax over allowed pairs whose rotary distance is `distance` [n, n], with every pair rotated by itself."""
    k, v = k.repeat_interleave(HEADS // KV_HEADS, 0), v.repeat_interleave(HEADS // KV_HEADS, 0)
    rate = 10000.0 ** -(torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH)
    angle = distance[..., None] * rate
    a, b = q.chunk(2, -1)
    c, d = k.chunk(2, -1)
    same = a[:, :, None] * c[:, None] + b[:, :, None] * d[:, None]
    crossed = b[:, :, None] * c[:, None] - a[:, :, None] * d[:, None]
    logits = (same * angle.cos() - crossed * angle.sin()).sum(-1) * WIDTH**-0.5
    return torch.softmax(logits.masked_fill(~allow, -torch.inf), -1) @ v


def lags(length):
    place = torch.arange(length)
    return place[:, None] - place[None]


@pytest.mark.parametrize("chunk", [1, 7, 32])
def test_core_infllm_within_the_window_it_is_full_attention(chunk):
    q, k, v = row(32)
    got, _ = read(BlockMemoryOptions(n_init=4, n_local=32, block=4, topk=0, chunk=chunk), q, k, v)
    lag = lags(32)
    assert torch.allclose(got, oracle(q, k, v, lag >= 0, lag), atol=1e-10)


@pytest.mark.parametrize(("block", "chunk", "pieces"), [(1, 1, ()), (4, 8, ()), (5, 7, (13, 14, 50)), (16, 16, (3,))])
def test_core_infllm_all_blocks_at_true_distances_are_full_attention(block, chunk, pieces):
    q, k, v = row(97)
    options = BlockMemoryOptions(n_init=5, n_local=16, block=block, topk=100, chunk=chunk, far="absolute")
    got, _ = read(options, q, k, v, pieces)
    lag = lags(97)
    assert torch.allclose(got, oracle(q, k, v, lag >= 0, lag), atol=1e-10)


def test_core_infllm_without_memory_it_is_a_window_with_sinks_at_a_fixed_distance():
    q, k, v = row(60)
    got, _ = read(BlockMemoryOptions(n_init=3, n_local=16, block=1, topk=0, chunk=1), q, k, v)
    lag = lags(60)
    sink = (torch.arange(60) < 3)[None] & (lag >= 16)
    allow = ((lag >= 0) & (lag < 16)) | sink
    assert torch.allclose(got, oracle(q, k, v, allow, torch.where(sink, 15, lag)), atol=1e-10)


@pytest.mark.parametrize("far", ["fixed", "absolute"])
def test_core_infllm_probabilities_of_both_branches_sum_to_one(far):
    q, k, _ = row(90)
    got, state = read(BlockMemoryOptions(n_init=4, n_local=16, block=4, topk=2, chunk=8, far=far), q, k, torch.ones_like(k))
    assert torch.allclose(got, torch.ones_like(got), atol=1e-10)
    # Chunk by chunk, local shares are what the tokens were given: no more than one for each query.
    assert (state.score.sum(1) <= 90).all()
    assert (state.score >= 0).all()


def test_core_infllm_a_token_is_scored_by_its_share_of_the_joint_softmax_while_it_is_in_the_window():
    """At every length, for all tokens that no block holds yet: the others' are not asked for again."""
    q, k, _ = row(60)
    memory = BlockMemoryOptions(n_init=3, n_local=16, block=1, topk=0, chunk=1).build()
    state = memory.start(HEADS, KV_HEADS, WIDTH, like=q)
    lag = lags(60)
    sink = (torch.arange(60) < 3)[None] & (lag >= 16)
    local = (lag >= 0) & (lag < 16)
    every = torch.eye(60, dtype=torch.float64).expand(KV_HEADS, 60, 60)  # values that give the probabilities themselves
    p = oracle(q, k, every, local | sink, torch.where(sink, 15, lag)) * local
    for length in range(1, 61):
        memory(q[:, length - 1 : length], k[:, length - 1 : length], k[:, length - 1 : length], state)
        kept = state.score.shape[1]
        assert kept == length - (3 + state.means.shape[1] if state.means.shape[1] else 0)
        assert torch.allclose(state.score, p[:, :length, length - kept : length].sum(1), atol=1e-10)


@pytest.mark.parametrize("chunk", [1, 7])
def test_core_infllm_a_block_is_formed_when_the_last_of_its_tokens_has_left_every_window(chunk):
    q, k, v = row(61)
    memory = BlockMemoryOptions(n_init=3, n_local=16, block=4, topk=1, chunk=chunk).build()
    state = memory.start(HEADS, KV_HEADS, WIDTH, like=q)
    for start in range(0, 61, chunk):
        part = slice(start, start + chunk)
        memory(q[:, part], k[:, part], v[:, part], state)
        seen = max(0, start - 15)  # the first query of this chunk still has the tokens from here in its window
        assert state.means.shape[1] == max(0, seen - 3) // 4


def test_core_infllm_the_result_does_not_depend_on_the_cache():
    q, k, v = row(300)
    results, loads = [], []
    for capacity in (0, 1, 3, 1000):
        out, state = read(BlockMemoryOptions(n_init=4, n_local=16, block=4, topk=3, chunk=4, capacity=capacity), q, k, v)
        assert len(state.held) <= capacity
        results.append(out)
        loads.append(state.loads)
    assert all(torch.equal(results[0], other) for other in results[1:])
    assert loads == sorted(loads, reverse=True)
    assert loads[-1] < loads[0]


def test_the_block_that_fits_is_found():
    q, k, v = row(400)
    k[:, 100:104] *= 0.1
    k[:, 100:104] += 6.0  # a block of like keys far behind the window: 24 blocks after the first 4 tokens
    q[:, 396:] = 6.0
    options = BlockMemoryOptions(n_init=4, n_local=16, block=4, topk=1, chunk=4)
    memory = options.build()
    state = memory.start(HEADS, KV_HEADS, WIDTH, like=q)
    memory(q[:, :396], k[:, :396], v[:, :396], state)
    state.held.clear()
    memory(q[:, 396:], k[:, 396:], v[:, 396:], state)
    assert list(state.held) == [24]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="must fit in the window"):
        BlockMemoryOptions(n_local=8, chunk=9)
    q, k, v = row(5)
    memory = BlockMemoryOptions(n_local=8, chunk=4).build()
    with pytest.raises(ValueError, match="block memory wants"):
        memory(q, k[:, :3], v, memory.start(HEADS, KV_HEADS, WIDTH, like=q))
