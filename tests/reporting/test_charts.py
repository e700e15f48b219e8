"""Charts: ticks, thinning, smoothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.reporting.charts import Line, line_chart, smooth, thin
from vlm.reporting.words import count, duration, span, tick


@given(st.floats(-1e9, 1e9), st.floats(0, 1e9))
def test_ticks_cover_the_range_in_round_steps(low, width):
    ticks, step = span(low, low + width)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low + step * 1e-3
    assert ticks[-1] >= low + width - step * 1e-3
    assert all(len(tick(value, step)) < 18 for value in ticks)


def test_ticks_are_short_and_distinct():
    for low, high in ((0, 1e-3), (0, 5), (99.5, 100.5), (0, 300), (0, 2.5e6), (0.1, 0.101)):
        ticks, step = span(low, high)
        said = [tick(value, step) for value in ticks]
        assert len(set(said)) == len(said)
    assert [tick(v, s) for v, s in ((0.00025, 0.00025), (1e-3, 2.5e-4), (7.5e-4, 2.5e-4), (250.0, 50.0), (0.25, 0.25))] == [
        "2.5e-4", "1e-3", "7.5e-4", "250", "0.25",
    ]  # fmt: skip


def test_thinning_keeps_spikes_and_order():
    points = [(float(i), 1.0) for i in range(10_000)]
    points[7321] = (7321.0, 99.0)
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert (7321.0, 99.0) in kept
    assert kept == sorted(kept)


def test_smoothing_does_not_lag_behind_a_line():
    points = [(float(i), 3.0 * i) for i in range(200)]
    found = smooth(points, 10)
    assert [x for x, _ in found] == [x for x, _ in points]
    assert [y for _, y in found] == pytest.approx([y for _, y in points])
    assert smooth([(0.0, float("nan")), (1.0, 2.0)]) == [(1.0, 2.0)]


def test_a_constant_a_single_point_and_nothing():
    assert "<polyline" in line_chart("x", [Line("x", [(1, 2.0), (2, 2.0)])])
    assert "<circle" in line_chart("x", [Line("x", [(5, 2.0)])])
    assert line_chart("x", [Line("x", [])]) == ""
    assert line_chart("x", [Line("x", [(1, float("nan"))])]) == ""


def test_words_for_sizes_and_times():
    assert (count(None), count(1234), count(5_210_000)) == ("unknown", "1,234", "5.21 million")
    assert (duration(0.2), duration(59), duration(600), duration(3725 * 2)) == (
        "under a second",
        "59 s",
        "10 min",
        "2 h 4 min",
    )
