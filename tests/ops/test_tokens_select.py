"""Selection of tokens by score and pooling of token grids, against loops and torch's own pools."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vlm import ops

BACKENDS = ["native", "torch"]


def select_by_hand(scores: list[float], k: int, always: list[bool], valid: list[bool]) -> list[int]:
    candidates = [i for i in range(len(scores)) if valid[i] and not always[i]]
    value = [-math.inf if math.isnan(s) else s for s in scores]
    best = sorted(candidates, key=lambda i: (-value[i], i))[: max(k, 0)]
    return sorted([*best, *(i for i in range(len(scores)) if valid[i] and always[i])])


score = st.one_of(st.sampled_from([0.0, -0.0, 1.0, math.nan, math.inf, -math.inf]), st.floats(width=32, allow_subnormal=False))


@given(rows=st.integers(0, 20).flatmap(lambda n: st.lists(st.lists(score, min_size=n, max_size=n), min_size=1, max_size=3)),
       k=st.integers(-1, 25), protect=st.integers(0, 5), seed=st.integers(0, 5), use_masks=st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_core_select_top_ascending_ragged_lowest_index(rows: list[list[float]], k: int, protect: int, seed: int,
                                                       use_masks: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, n = len(rows), len(rows[0])
    scores = torch.tensor(rows).view(b, n)
    valid = torch.rand(b, n, generator=generator) < 0.7
    always = torch.rand(b, n, generator=generator) < 0.3
    counts = torch.randint(-1, n + 2, (b,), generator=generator)
    for backend in BACKENDS:
        with ops.backend(backend):
            if use_masks:
                got = ops.select_top(scores, counts, always, valid=valid)
                expected = [select_by_hand(r, int(c), a, v) for r, c, a, v in zip(rows, counts, always.tolist(), valid.tolist())]
            else:
                got = ops.select_top(scores, k, protect)
                expected = [select_by_hand(r, k, [i < protect for i in range(n)], [True] * n) for r in rows]
        assert got.counts.tolist() == [len(e) for e in expected]
        assert got.indices.shape[1] == max(len(e) for e in expected)
        for row, e in zip(got.indices.tolist(), expected):
            assert row == e + [-1] * (len(row) - len(e))


@pytest.mark.parametrize("backend", BACKENDS)
def test_core_select_a_ragged_batch_is_a_loop_over_its_rows(backend: ops.Backend, level: str) -> None:
    scores, counts = torch.randn(5, 700), torch.tensor([1, 350, 0, 700, 13])
    with ops.backend(backend):
        together = ops.select_top(scores, counts)
        for b in range(5):
            alone = ops.select_top(scores[b : b + 1], int(counts[b]))
            assert torch.equal(together.indices[b, : counts[b]], alone.indices[0])
            assert torch.equal(alone.indices[0], scores[b].topk(int(counts[b])).indices.sort().values)
        assert torch.equal(ops.select_top(scores, 700).indices, torch.arange(700).expand(5, -1))
        fixed = ops.select_top(scores, counts, size=400)
    assert fixed.indices.shape == (5, 400)
    assert fixed.counts.tolist() == [1, 350, 0, 400, 13]


@pytest.mark.parametrize("backend", BACKENDS)
def test_threshold(backend: ops.Backend) -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5, math.nan, 0.7, 0.5]] * 2)
    with ops.backend(backend):
        assert ops.select_threshold(scores, 0.5).indices.tolist() == [[0, 4]] * 2
        assert ops.select_threshold(scores, 0.5, 2).indices.tolist() == [[0, 1, 4]] * 2
        assert ops.select_threshold(scores, 2.0, least=2).indices.tolist() == [[0, 4]] * 2
        assert ops.select_threshold(scores, 0.0, most=3).indices.tolist() == [[0, 2, 4]] * 2
        per_row = ops.select_threshold(scores, torch.tensor([[0.6], [5.0]]))
    assert per_row.indices.tolist() == [[0, 4], [-1, -1]]
    assert per_row.counts.tolist() == [2, 0]


def test_fopru_rows() -> None:
    scores = torch.tensor([[1.0, 1, 5, 0, 3, 3, 0, 0, 2, 0, 0, 0]])  # rows of a 4 x 3 grid sum to 7, 6, 2, 0
    for k, drop, cut in [(0, [], []), (3, [0, 1, 2], [0, 1, 2]), (5, [0, 1, 2], [0, 1, 2, 4, 5]), (6, [0, 1, 2, 3, 4, 5], None),
                         (12, list(range(12)), None), (99, list(range(12)), None)]:
        got = ops.select_rows(scores, (4, 3), k)
        assert got.indices[0].tolist() == drop
        assert got.counts.tolist() == [len(drop)]
        assert ops.select_rows(scores, (4, 3), k, last="cut").indices[0].tolist() == (drop if cut is None else cut)


def test_fopru_rank_and_rows_agree_when_scores_are_constant_inside_rows() -> None:
    scores = torch.randn(2, 6, 1).expand(2, 6, 5).reshape(2, 30)
    assert torch.equal(ops.select_rows(scores, (6, 5), 15).indices, ops.select_top(scores, 15).indices)


# ---- pooling


@given(n=st.lists(st.integers(1, 13), min_size=2, max_size=3), m=st.lists(st.integers(1, 13), min_size=3, max_size=3))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_core_pool_adaptive_equals_torch_on_ragged_sizes(n: list[int], m: list[int]) -> None:
    x, shape = torch.randn(2, *n, 5), m[: len(n)]
    pool = F.adaptive_avg_pool2d if len(n) == 2 else F.adaptive_avg_pool3d
    torch.testing.assert_close(ops.adaptive_pool(x, shape), pool(x.movedim(-1, 1), shape).movedim(1, -1))


def test_core_pool_adaptive_identity_constant_divisible_and_the_bins_of_24_to_5() -> None:
    x = torch.randn(2, 4, 6, 8, 3)
    assert torch.equal(ops.adaptive_pool(x, (4, 6, 8)), x)
    torch.testing.assert_close(ops.adaptive_pool(torch.full((1, 7, 5, 2), 3.25), (3, 4)), torch.full((1, 3, 4, 2), 3.25))
    torch.testing.assert_close(ops.adaptive_pool(x, (2, 3, 2)), F.avg_pool3d(x.movedim(-1, 1), (2, 2, 4)).movedim(1, -1))
    bins = [row.nonzero()[:, 0] for row in ops.pooling_matrix(24, 5)]
    assert [(int(b[0]), int(b[-1])) for b in bins] == [(0, 4), (4, 9), (9, 14), (14, 19), (19, 23)]


@pytest.mark.parametrize("order", ["block-major", "channel-major"])
def test_core_pool_pixel_shuffle_then_unshuffle_is_identity(order: ops.ShuffleOrder) -> None:
    x = torch.randn(2, 6, 9, 5)
    small = ops.pixel_shuffle_tokens(x, 3, order=order)
    assert small.shape == (2, 2, 3, 45)
    assert torch.equal(ops.pixel_unshuffle_tokens(small, 3, order=order), x)
    channel_major = F.pixel_unshuffle(x.movedim(-1, 1), 3).movedim(1, -1)
    assert torch.equal(small if order == "channel-major" else small[..., ops.pixel_shuffle_permutation(5, 3)], channel_major)
    if order == "block-major":
        assert torch.equal(small[0, 1, 2, (2 * 3 + 1) * 5 + 4], x[0, 3 + 2, 6 + 1, 4])


def test_core_pool_progressive_keeps_time_order() -> None:
    x = torch.randn(2, 5, 6, 4, 3)
    tokens, counts = ops.progressive_pool(x, group=2, stride_high=2, stride_low=4)
    assert counts.tolist() == [6, 2, 6, 2, 6]
    frames = tokens.split(counts.tolist(), dim=1)
    for t, frame in enumerate(frames):
        shape = (3, 2) if t % 2 == 0 else (2, 1)
        torch.testing.assert_close(frame, ops.adaptive_pool(x[:, t], shape).flatten(1, 2))
    same, _ = ops.progressive_pool(x, group=2, stride_high=1, stride_low=1)
    assert torch.equal(same, x.flatten(1, 3))
