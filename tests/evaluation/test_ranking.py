"""Ranks against brute force, with ties, duplicates and several right candidates."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm.evaluation.ranking import chance_at, first_places, ranks


def brute(queries, candidates, pairs, tie):
    out = []
    for q in range(len(queries)):
        right = {int(c) for p, c in pairs if p == q}
        if not right:
            out.append(0)
            continue
        score = [float(np.dot(queries[q].astype(np.float64), c.astype(np.float64))) for c in candidates]
        best = max(score[c] for c in right)
        out.append(1 + sum(1 for c, s in enumerate(score) if c not in right and s >= best - tie))
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(1, 12),
    st.integers(1, 15),
    st.integers(0, 30),
    st.integers(1, 7),
    st.integers(1, 7),
)
def test_equal_to_brute_force_with_ties_duplicates_and_any_chunking(seed, q, n, p, rows, columns):
    generator = np.random.default_rng(seed)
    # Few distinct integer directions: many exact ties and duplicated rows.
    queries = generator.integers(-1, 2, size=(q, 3)).astype(np.float32)
    candidates = generator.integers(-1, 2, size=(n, 3)).astype(np.float32)
    pairs = np.stack([generator.integers(0, q, p), generator.integers(0, n, p)], axis=1).astype(np.int64)
    found = ranks(queries, candidates, pairs, rows=rows, columns=columns)
    assert found.tolist() == brute(queries, candidates, pairs, 1e-6)


def test_a_collapsed_model_ranks_last_not_first():
    same = np.full((50, 8), 8**-0.5, dtype=np.float32)
    pairs = np.stack([np.arange(50), np.arange(50)], axis=1)
    assert set(ranks(same, same, pairs).tolist()) == {50}


def test_any_of_several_right_candidates_is_a_hit():
    queries = np.eye(3, dtype=np.float32)[:1]
    candidates = np.array([[0.1, 0, 0], [0.5, 0, 0], [0.9, 0, 0]], dtype=np.float32)
    assert ranks(queries, candidates, np.array([[0, 0]])).tolist() == [3]
    assert ranks(queries, candidates, np.array([[0, 0], [0, 2]])).tolist() == [1]


def test_chance_is_hypergeometric():
    rights = np.array([1, 3, 10])
    found = chance_at(rights, 10, (1, 5, 20))
    for column, k in enumerate((1, 5, 10)):
        wanted = np.mean([1 - math.comb(10 - c, k) / math.comb(10, k) for c in rights])
        assert found[column] == pytest.approx(wanted)


def test_chance_equals_the_share_that_random_embeddings_reach():
    generator = np.random.default_rng(0)
    hits = []
    pairs = np.array([[q, c] for q in range(40) for c in (q, (q + 7) % 40)])
    for _ in range(60):
        a, b = (generator.normal(size=(40, 16)).astype(np.float32) for _ in range(2))
        hits.append((ranks(a, b, pairs) <= 5).mean())
    wanted = chance_at(np.full(40, 2), 40, (5,))[0]
    assert np.mean(hits) == pytest.approx(wanted, abs=4 * np.std(hits) / math.sqrt(60))


def test_first_places_breaks_ties_by_number():
    scores = np.array([[0.5, 0.9, 0.5, 0.9]], dtype=np.float32)
    assert first_places(scores, 3).tolist() == [[1, 3, 0]]
