"""The rule of the verdict, and the interval it reads."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.workflows.reproduce.statistics import VERDICTS, Paired, t_quantile, verdict

TWO_SIDED_95 = {  # the usual printed table
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228,
    11: 2.201, 12: 2.179, 13: 2.160, 14: 2.145, 15: 2.131, 16: 2.120, 17: 2.110, 18: 2.101, 19: 2.093, 20: 2.086,
    21: 2.080, 22: 2.074, 23: 2.069, 24: 2.064, 25: 2.060, 26: 2.056, 27: 2.052, 28: 2.048, 29: 2.045, 30: 2.042,
    60: 2.000, 120: 1.980,
}  # fmt: skip


@pytest.mark.parametrize(("freedom", "expected"), TWO_SIDED_95.items())
def test_t_quantile_is_the_printed_table(freedom, expected):
    assert t_quantile(freedom) == pytest.approx(expected, abs=6e-4)


def test_t_quantile_at_other_levels():
    assert t_quantile(1, 0.99) == pytest.approx(63.657, abs=1e-3)
    assert t_quantile(10, 0.9) == pytest.approx(1.812, abs=1e-3)
    assert t_quantile(1, 0.5) == pytest.approx(1.0, abs=1e-9)  # Cauchy
    assert t_quantile(2000) == pytest.approx(1.96, abs=2e-3)


@pytest.mark.parametrize("arguments", [(0,), (-1,), (3, 0.0), (3, 1.0)])
def test_t_quantile_refuses_what_has_none(arguments):
    with pytest.raises(ValueError, match="degrees of freedom"):
        t_quantile(*arguments)


@pytest.mark.parametrize(
    ("lower", "mean", "upper", "expected"),
    [  # margin 2
        (1.0, 3.0, 5.0, "holds"),
        (0.1, 2.0, 3.9, "holds"),  # the mean at the margin is enough
        (2.5, 3.0, 3.5, "holds"),
        (-1.0, 0.2, 1.4, "not seen"),
        (-1.9, 0.0, 1.9, "not seen"),
        (0.0, 0.5, 1.0, "not seen"),  # 0 at the edge is inside
        (-1.0, -0.5, 0.0, "not seen"),
        (0.5, 1.0, 1.5, "fails"),  # an effect, but less than claimed
        (-3.0, -2.0, -1.0, "fails"),  # reversed
        (-0.3, -0.2, -0.1, "fails"),
        (-4.0, -1.5, 1.0, "fails"),  # the claimed effect is excluded, a reversed one is not
        (-2.0, -0.5, 1.0, "fails"),  # the interval has to lie strictly inside
        (-1.0, 0.5, 2.0, "underpowered"),  # it reaches the margin
        (-10.0, 0.0, 10.0, "underpowered"),
        (-1.0, 3.0, 7.0, "underpowered"),  # above the margin, but 0 is not excluded
        (0.0, 3.0, 6.0, "underpowered"),
        (0.5, 1.5, 2.5, "underpowered"),  # above 0, the margin undecided
        (-math.inf, 5.0, math.inf, "underpowered"),  # one seed
    ],
)
def test_the_rule_case_by_case(lower, mean, upper, expected):
    assert verdict(mean, lower, upper, 2.0) == expected


def test_a_margin_of_nothing_leaves_better_worse_or_undecided():
    assert verdict(1.0, 0.5, 1.5, 0.0) == "holds"
    assert verdict(-1.0, -1.5, -0.5, 0.0) == "fails"
    assert verdict(0.0, -1.0, 1.0, 0.0) == "underpowered"


ordered = st.lists(st.floats(-20, 20), min_size=3, max_size=3).map(sorted)


@given(ordered, st.floats(0, 10))
def test_every_interval_has_one_verdict_that_says_what_it_says(bounds, margin):
    lower, mean, upper = bounds
    found = verdict(mean, lower, upper, margin)
    assert found in VERDICTS
    if found == "holds":
        assert lower > 0
        assert mean >= margin
    elif found == "fails":
        assert upper < margin
        assert not (lower <= 0 <= upper and lower > -margin)
    elif found == "not seen":
        assert lower <= 0 <= upper
        assert -margin < lower <= upper < margin
    else:
        assert upper >= margin  # more seeds could still show the effect


@given(ordered, st.floats(0, 10), st.floats(0, 5))
def test_a_claim_that_holds_holds_for_a_smaller_margin_and_a_better_figure(bounds, margin, more):
    lower, mean, upper = bounds
    if verdict(mean, lower, upper, margin) == "holds":
        assert verdict(mean, lower, upper, margin / 2) == "holds"
        assert verdict(mean + more, lower + more, upper + more, margin) == "holds"


@pytest.mark.parametrize("wrong", [(math.nan, 0, 1, 1), (2, 0, 1, 1), (0, 1, 2, 1), (0, -1, 1, -1)])
def test_what_is_no_interval_is_refused(wrong):
    with pytest.raises(ValueError, match="no interval"):
        verdict(*wrong)


def test_the_interval_is_the_t_interval_of_the_differences():
    found = Paired.of([5.0, 7.0, 9.0], [4.0, 5.0, 6.0])  # differences 1, 2, 3: mean 2, deviation 1
    half = 4.302653 / math.sqrt(3)
    assert (found.pairs, found.mean) == (3, 2.0)
    assert found.lower == pytest.approx(2 - half, abs=1e-5)
    assert found.upper == pytest.approx(2 + half, abs=1e-5)


def test_what_both_arms_share_drops_out():
    """Pairing: a seed that is hard for both widens nothing."""
    hard = [0.0, 50.0, -30.0, 10.0]
    found = Paired.of([x + 1.0 for x in hard], hard)
    assert (found.mean, found.lower, found.upper) == pytest.approx((1.0, 1.0, 1.0))


def test_lower_is_better_turns_the_sign():
    up, down = Paired.of([3.0, 4.0], [1.0, 1.0]), Paired.of([3.0, 4.0], [1.0, 1.0], "lower")
    assert (down.mean, down.lower, down.upper) == (-up.mean, -up.upper, -up.lower)


def test_one_pair_decides_nothing():
    found = Paired.of([100.0], [0.0])
    assert (found.lower, found.upper) == (-math.inf, math.inf)
    assert found.verdict(1.0) == "underpowered"


def test_figures_that_do_not_pair_are_refused():
    for method, baseline in (([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(ValueError, match="cannot be paired"):
            Paired.of(method, baseline)
