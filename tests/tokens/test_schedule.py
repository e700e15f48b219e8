"""How many positions each layer reads: schedules and the solved sigmoid."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from vlm.tokens import ScheduleOptions, sigmoid_rates, solved_alpha, solved_rates
from vlm.tokens.schedule import KeepPlan

MAKE = TypeAdapter(ScheduleOptions).validate_python


def read(table, tokens, depth):
    return MAKE(table).plan(depth).read(tokens, depth)


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"kind": "constant", "ratio": 0.29}, [100, 29, 29, 29, 29, 29]),
        ({"kind": "one-cut", "after": 2, "ratio": 0.5}, [100, 100, 50, 50, 50, 50]),
        ({"kind": "stages", "layers": [1, 4], "ratios": [0.7, 0.07]}, [100, 70, 70, 70, 7, 7]),
        ({"kind": "linear", "start": 2, "step": 0.125}, [100, 100, 87, 75, 62, 50]),
        ({"kind": "linear", "start": 1, "step": 0.5}, [100, 50, 0, 0, 0, 0]),
        ({"kind": "table", "ratios": [1, 1, 0.58, 0.58, 0.14, 0]}, [100, 100, 58, 58, 14, 0]),
        ({"kind": "table", "ratios": [1, 0.5, 0.1, 0, 0, 0], "min_tokens": 20}, [100, 50, 20, 20, 20, 20]),
    ],
)
def test_core_select_schedules_floor_the_original_count_in_integers(table, expected):
    assert read(table, 100, 6) == expected
    assert read(table, 1, 6) == sorted(read(table, 1, 6), reverse=True)
    if "min_tokens" in table:
        assert read(table, 7, 6) == [7] * 6  # never more than there are


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "one-cut", "after": 6, "ratio": 0.5}, "expected below the language model's depth 6"),
        ({"kind": "linear", "start": 9}, "expected below the language model's depth 6"),
        ({"kind": "table", "ratios": [1, 0.5]}, "has 2 entries, the language model 6 layers"),
        ({"kind": "table", "ratios": [0.9] * 6}, "expected 1"),
        ({"kind": "table", "ratios": [1, 0.2, 0.5, 0, 0, 0]}, "never rising"),
        ({"kind": "sigmoid", "k": 1.0}, "either budget or alpha"),
        ({"kind": "sigmoid", "k": 1.0, "budget": 0.5, "alpha": 2.0}, "either budget or alpha"),
        ({"kind": "sigmoid", "k": 1.0, "budget": 0.1}, "out of reach"),
        ({"kind": "sigmoid", "k": 0.0, "budget": 0.5}, "greater than 0"),
        ({"kind": "sigmoid", "alpha": 2.0, "low": 0.5, "high": 0.2}, "must not rise"),
    ],
)
def test_a_schedule_that_does_not_fit_says_why(table, said):
    with pytest.raises(ValueError, match=said):
        read(table, 100, 6)


@settings(max_examples=60, deadline=None)
@given(
    depth=st.integers(2, 40), k=st.floats(1e-3, 50), budget=st.floats(0.01, 1.0), full=st.integers(0, 1), tokens=st.integers(1, 700),
    low=st.floats(0, 0.3),
)
def test_vision_token_search_solved_alpha_meets_the_budget_within_one_token(depth, k, budget, full, tokens, low):
    least = (full + (depth - full) * low) / depth
    if budget <= least + 1e-6:
        return
    rates = solved_rates(depth, k, budget, low=low, full=full)
    assert abs(sum(rates) / depth - budget) < 1e-9
    assert all(b <= a + 1e-15 for a, b in pairwise(rates))  # never more than before: the sets are nested
    counts = [int(tokens * rate) for rate in rates]
    assert budget * tokens - 1 <= sum(counts) / depth + 1e-6 <= budget * tokens + 1e-5
    if full and not low:
        table = {"kind": "sigmoid", "k": k, "budget": budget}
        own = read(table, tokens, depth)
        assert own == sorted(own, reverse=True)
        assert abs(sum(own) / depth - budget * tokens) <= 1 + 1e-3


def test_vision_token_search_alpha_grows_with_the_budget():
    alphas = [solved_alpha(12, 0.4, b / 20) for b in range(3, 20)]
    assert all(b > a for a, b in pairwise(alphas))


def test_vision_token_search_small_k_is_flat_and_large_k_a_step():
    flat = solved_rates(8, 1e-6, 0.375, full=0)
    assert all(abs(rate - 0.375) < 1e-4 for rate in flat)
    step = solved_rates(8, 500.0, 0.375, full=0)  # at layer b L = 3
    assert [round(rate, 6) for rate in step] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert sigmoid_rates(4, 1.0, 2.5, full=0)[1:3] == pytest.approx([1 / (1 + 2.718281828**-0.5), 1 / (1 + 2.718281828**0.5)])
    assert sigmoid_rates(4, 1e4, 2.5, low=0.25, high=0.75, full=0) == [0.75, 0.75, 0.25, 0.25]  # and no overflow


def test_vision_token_search_a_budget_of_one_keeps_all():
    for k in (0.1, 0.4, 5.0):
        assert read({"kind": "sigmoid", "k": k, "budget": 1.0}, 576, 32) == [576] * 32


def test_shares_are_the_fractions_that_were_meant():
    assert MAKE({"kind": "table", "ratios": [1.0, 0.3333333333333333, 1 / 49]}).shares(3) == {1: Fraction(1, 3), 2: Fraction(1, 49)}
    assert KeepPlan({1: Fraction(1, 3)}).counts(9) == {1: 3}
