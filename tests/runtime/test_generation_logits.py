"""Logit rules against those of transformers and against sums written out; draws against NumPy's own generator."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as peer

from vlm.runtime.generation import logits as rules
from vlm.runtime.generation.draws import draw, row_key, uniform

SIZES = [1, 2, 13, 1009]


def drawn(size: int, rows: int = 3, dtype=np.float32, seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng([seed, size]).normal(size=(rows, size))).astype(dtype)


def as_peer(rule, logits: np.ndarray, ids=None) -> np.ndarray:
    given_ids = torch.zeros((len(logits), 0), dtype=torch.long) if ids is None else torch.from_numpy(ids)
    return rule(given_ids, torch.from_numpy(logits.copy())).numpy()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [1, 2, 7, 2000])
def test_top_k_as_in_transformers(size, value):
    logits = drawn(size)
    np.testing.assert_array_equal(rules.top_k(logits, value), as_peer(peer.TopKLogitsWarper(value), logits))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.01, 0.3, 0.9, 0.999])
def test_top_p_as_in_transformers(size, value):
    logits = drawn(size, dtype=np.float64)
    np.testing.assert_array_equal(rules.top_p(logits, value), as_peer(peer.TopPLogitsWarper(value), logits))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [0.001, 0.1, 1.0])
def test_min_p_as_in_transformers(size, value):
    logits = drawn(size, dtype=np.float64)
    np.testing.assert_array_equal(rules.min_p(logits, value), as_peer(peer.MinPLogitsWarper(value), logits))


@pytest.mark.parametrize("size", SIZES)
def test_repetition_penalty_as_in_transformers(size):
    logits = drawn(size)
    ids = np.random.default_rng(1).integers(0, size, (len(logits), 5))
    ours = np.stack([rules.repetition_penalty(row, seen, 1.3) for row, seen in zip(logits, ids)])
    np.testing.assert_allclose(ours, as_peer(peer.RepetitionPenaltyLogitsProcessor(1.3), logits, ids), rtol=1e-6)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_that_reach_p_even_with_ties(values, p):
    logits = np.array(values, np.float64)
    probability = rules.softmax(logits)
    order = sorted(range(len(values)), key=lambda i: (-probability[i], i))
    count = next((n for n in range(1, len(order) + 1) if probability[order[:n]].sum() >= p), len(order))
    kept = set(np.flatnonzero(rules.top_p(logits, p) > -np.inf).tolist())
    # A sum that meets p to the last bit may fall on either side of it.
    assert kept in (set(order[:count]), set(order[: count - 1]), set(order[: count + 1]))
    assert kept == set(order[:count]) or math.isclose(probability[order[: min(count, len(kept))]].sum(), p, rel_tol=1e-12)


def test_top_k_keeps_what_equals_the_kth():
    np.testing.assert_array_equal(rules.top_k(np.array([1.0, 3.0, 1.0, 0.0]), 2) > -np.inf, [True, True, True, False])


def test_rules_that_are_off_change_nothing():
    logits = drawn(17)
    for out in (rules.top_k(logits, 0), rules.top_p(logits, 1.0), rules.min_p(logits, 0.0), rules.temperature(logits, 1.0)):
        np.testing.assert_array_equal(out, logits)


def test_no_rule_writes_to_its_input():
    logits = drawn(17)
    before = logits.copy()
    rules.restrict(logits, np.arange(17) < 3)
    rules.contrast(logits, logits[::-1], 1.0, 0.5)
    rules.repetition_penalty(logits[0], np.array([1, 2]), 2.0)
    rules.top_k(logits, 3)
    rules.top_p(logits, 0.5)
    rules.min_p(logits, 0.5)
    rules.temperature(logits, 0.5)
    rules.log_softmax(logits)
    np.testing.assert_array_equal(logits, before)


def test_softmax_and_its_logarithm_hold_for_huge_and_for_masked_logits():
    logits = np.array([[3e38, 0.0, -np.inf], [-3e38, -3e38, -np.inf]], np.float32)
    np.testing.assert_array_equal(rules.softmax(logits), [[1, 0, 0], [0.5, 0.5, 0]])
    np.testing.assert_allclose(rules.log_softmax(logits)[1], [-math.log(2), -math.log(2), -np.inf])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("alpha", [-1.0, 0.0, 0.3, 1.0, 6.0])
def test_debias_lvlm_equal_branches_leave_the_logits_unchanged_for_all_alpha(dtype, alpha):
    logits = drawn(101, dtype=dtype)
    np.testing.assert_array_equal(rules.contrast(logits, logits.copy(), alpha, 0.0), logits)
    np.testing.assert_array_equal(rules.contrast(logits, logits.copy(), alpha, 0.1), rules.cut(logits, logits, 0.1))


def test_debias_lvlm_contrast_is_the_sum_written_out():
    logits, negative = drawn(101, dtype=np.float64), drawn(101, dtype=np.float64, seed=1)
    out = rules.contrast(logits, negative, 0.7, 0.05)
    for row in range(3):
        for token in range(101):
            if logits[row, token] < max(logits[row]) + math.log(0.05):
                assert out[row, token] == -np.inf
            else:
                assert out[row, token] == pytest.approx(1.7 * logits[row, token] - 0.7 * negative[row, token], abs=1e-12)


def test_debias_lvlm_cut_off_is_by_the_original_logits():
    logits, negative = np.array([[2.0, 1.9, -5.0]]), np.array([[9.0, 1.0, -30.0]])
    out = rules.contrast(logits, negative, 1.0, 0.1)
    # The third would be the greatest after the contrast, the first the least; only the third is implausible.
    np.testing.assert_allclose(out, [[-5.0, 2.8, -np.inf]])


def test_debias_lvlm_beta_1_keeps_only_the_original_argmax():
    logits, negative = drawn(1009, rows=20), drawn(1009, rows=20, seed=1)
    out = rules.contrast(logits, negative, 3.0, 1.0)
    np.testing.assert_array_equal(out.argmax(1), logits.argmax(1))
    assert (np.isfinite(out).sum(1) == 1).all()


def test_contrast_leaves_tokens_that_a_branch_has_masked():
    logits, negative = np.array([[-np.inf, 1.0, 2.0]]), np.array([[0.0, -np.inf, 1.0]])
    np.testing.assert_array_equal(rules.contrast(logits, negative, 1.0, 0.0), [[-np.inf, 1.0, 3.0]])


def test_guidance_of_scale_g_is_a_contrast_of_g_minus_1():
    conditional, free = drawn(50, dtype=np.float64), drawn(50, dtype=np.float64, seed=1)
    np.testing.assert_allclose(rules.contrast(conditional, free, 6.0, 0.0), free + 7.0 * (conditional - free), atol=1e-12)


@pytest.mark.parametrize("step", [0, 1, 2, 1000])
def test_uniform_is_what_numpy_draws_first_from_philox(step):
    key = row_key(3, "row")
    assert uniform(key, step) == np.random.Generator(np.random.Philox(key=key, counter=step)).random()


def test_keys_tell_seed_row_and_kind_apart():
    assert len({row_key(s, r) for s in range(20) for r in (*range(20), *map(str, range(20)))}) == 800


def test_draw_gives_each_token_its_share():
    logits = np.array([-np.inf, 0.0, 1.0, -np.inf, 2.0, -np.inf])
    tokens = [draw(logits, (i + 0.5) / 10000) for i in range(10000)]
    np.testing.assert_allclose(np.bincount(tokens, minlength=6) / 10000, rules.softmax(logits), atol=1e-4)


@given(st.lists(st.floats(-50, 50) | st.just(-math.inf), min_size=1, max_size=9).filter(lambda x: max(x) > -math.inf), st.data())
def test_draw_never_takes_a_token_that_is_out(values, data):
    u = data.draw(st.floats(0, 1, exclude_max=True) | st.sampled_from([0.0, math.nextafter(1, 0)]))
    assert values[draw(np.array(values), u)] > -math.inf
