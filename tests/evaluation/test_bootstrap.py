"""Intervals: right centre, right width, right coverage, clusters drawn whole."""

import numpy as np
import pytest

from vlm.evaluation.bootstrap import bootstrap, bootstrap_sums, cluster_ids


def test_value_is_the_mean_and_bounds_match_the_normal_theory():
    values = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    estimate = bootstrap(values, resamples=3000)
    assert estimate.value[0] == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.upper[0] - estimate.value[0] == pytest.approx(half, rel=0.1)
    assert estimate.value[0] - estimate.lower[0] == pytest.approx(half, rel=0.1)


def test_same_seed_same_bounds_other_seed_other_bounds():
    values = np.random.default_rng(1).random(50)
    first, again, other = (bootstrap(values, seed=s) for s in (3, 3, 4))
    assert first.lower[0] == again.lower[0]
    assert first.lower[0] != other.lower[0]


def test_coverage_of_clustered_shares_is_near_nominal_only_with_clusters():
    generator = np.random.default_rng(2)
    covered = {True: 0, False: 0}
    rounds = 120
    for number in range(rounds):
        # 60 concepts of 8 pictures; whole concepts are easy or hard, so pictures are far from independent.
        easy = generator.random(60) < 0.4
        hits = (generator.random((60, 8)) < np.where(easy, 0.9, 0.1)[:, None]).reshape(-1)
        truth = 0.4 * 0.9 + 0.6 * 0.1
        names = np.repeat(np.arange(60), 8).tolist()
        for by_concept in covered:
            e = bootstrap(hits, clusters=names if by_concept else None, resamples=200, seed=number)
            covered[by_concept] += bool(e.lower[0] <= truth <= e.upper[0])
    assert 0.89 <= covered[True] / rounds <= 0.99
    assert covered[False] / rounds < 0.75


def test_clusters_equal_a_bootstrap_of_cluster_sums_when_sizes_are_equal():
    values = np.random.default_rng(5).random((40, 3))
    by_cluster = bootstrap(values.reshape(-1), clusters=np.repeat(np.arange(40), 3).tolist(), seed=9)
    means = bootstrap(values.mean(1), seed=9)
    np.testing.assert_allclose(by_cluster.lower, means.lower)
    np.testing.assert_allclose(by_cluster.upper, means.upper)
    assert by_cluster.clusters == 40


def test_ratio_is_of_sums_not_mean_of_ratios():
    estimate = bootstrap(np.array([1.0, 100.0]), np.array([1.0, 10.0]))
    assert estimate.value[0] == pytest.approx(101 / 11)


def test_all_wrong_still_has_an_interval_above_zero():
    estimate = bootstrap(np.zeros(20), share=True)
    assert estimate.lower[0] == 0.0
    assert 0.1 < estimate.upper[0] < 0.2  # Wilson: z^2 / (n + z^2)
    assert bootstrap(np.zeros(20)).upper[0] == 0.0


def test_absent_names_are_clusters_of_their_own():
    assert cluster_ids(["a", None, "b", None, "a"]).tolist() == [0, 1, 2, 3, 0]


def test_nothing_observed_is_refused():
    with pytest.raises(ValueError, match="no observations"):
        bootstrap(np.zeros(0))
    with pytest.raises(ValueError, match="denominator"):
        bootstrap(np.ones(3), np.zeros(3))


def test_sums_give_the_bounds_of_the_ratio_that_they_are():
    generator = np.random.default_rng(5)
    top, bottom = generator.random((40, 2)), generator.random((40, 2)) + 0.5
    names = (np.arange(40) // 3).tolist()
    expected = bootstrap(top, bottom, clusters=names, seed=3, resamples=300)
    found = bootstrap_sums(
        np.concatenate([top, bottom], axis=1),
        lambda sums: sums[..., :2] / sums[..., 2:],
        clusters=names,
        seed=3,
        resamples=300,
    )
    for name in ("value", "lower", "upper"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    assert found.clusters == expected.clusters == 14


def test_a_paired_difference_is_narrower_than_its_parts():
    generator = np.random.default_rng(6)
    hard = generator.random(300)  # how hard a sample is, for both
    first, second = (hard < 0.6).astype(float), (hard + 0.02 * generator.normal(size=300) < 0.55).astype(float)
    rows = np.stack([first, second, np.ones(300)], axis=1)

    def figures(sums):
        a, b = sums[..., 0] / sums[..., 2], sums[..., 1] / sums[..., 2]
        return np.stack([a, b, a - b], axis=-1)

    found = bootstrap_sums(rows, figures)
    width = found.upper - found.lower
    assert found.value[2] == pytest.approx(found.value[0] - found.value[1])
    assert width[2] < 0.6 * width[0]


def test_a_replicate_where_a_figure_is_not_defined_is_left_out():
    rows = np.array([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    with np.errstate(invalid="ignore"):
        found = bootstrap_sums(rows, lambda sums: (sums[..., 0] / sums[..., 1])[..., None])
    assert (found.value[0], found.lower[0], found.upper[0]) == (1, 1, 1)
    with pytest.raises(ValueError, match="no observations"):
        bootstrap_sums(rows[:0], lambda sums: sums)
