"""The estimate of `--dry-run`: what is measured and what of it counts, by a clock that the test turns."""

from __future__ import annotations

import dataclasses

import pytest

from tests.training.test_resume import TOY
from vlm.training import run as module
from vlm.training.plan import REPEATS, _Measured, make_plan
from vlm.training.preset import load_preset
from vlm.training.timing import Moment, Timed, at_size, read_clock
from vlm.training.trainer import Cursor


class Scripted:
    """Each look takes 1 s of a core and `other` s of waiting for one; each of the first `slow` looks 100 s more."""

    def __init__(self, slow: int = 0, other: float = 0.0) -> None:
        self.now, self.ran, self.slow, self.other = 0.0, 0.0, slow, other
        self.calls = 0

    def __call__(self) -> Moment:
        self.calls += 1
        slow = 100.0 if self.calls <= self.slow else 0.0
        self.now += 1 + slow + self.other
        self.ran += 1 + slow
        return Moment(self.now, self.ran)


def parts_of(tmp_path, *settings):
    preset, resolved = load_preset(TOY, ["scale.threads=1", *settings])
    run = module.Run(module.RunDirectory(tmp_path), preset, resolved, note=lambda text: None)
    return run.assemble(run.stages[0], Cursor(stage=0), initial=True, rehearse=True)


def test_what_the_first_calls_take_is_left_out(tmp_path):
    parts = parts_of(tmp_path)
    looks = 2 + 3 * 3  # at the first batch, and at three updates that warm up
    measured, quick = _Measured(parts, Scripted(slow=looks)), _Measured(parts, Scripted())
    parts.loader.close()
    assert measured.step.median() == quick.step.median() == 1.0
    assert measured.step.greatest() == 1.0
    assert len(quick.step) == 4  # of 2 s with their gradients: the patience is over
    assert quick.ran == 1.0


def test_other_work_is_seen(tmp_path):
    parts = parts_of(tmp_path)
    measured = _Measured(parts, Scripted(other=3.0))
    parts.loader.close()
    assert measured.ran == pytest.approx(0.25)
    assert measured.step.median() == 4.0


def test_a_plan_says_its_range_and_what_other_work_took(tmp_path):
    parts = parts_of(tmp_path)
    plan = make_plan(parts, str(tmp_path))
    parts.loader.close()
    assert plan.seconds_range[0] <= plan.seconds_per_step <= plan.seconds_range[1]
    assert 0 < plan.ran <= 1
    loaded = dataclasses.replace(plan, ran=0.25, seconds=4000.0, seconds_per_step=2.0, seconds_range=(1.0, 8.0))
    lines = loaded.lines()
    assert "time: about 67 min (2.00 s an update, 1.00 to 8.00 measured)" in lines
    assert lines[-1] == "other work on this machine took 75% of the measured time: alone about 17 min"
    assert not any("other work" in line for line in dataclasses.replace(plan, ran=1.0).lines())


@pytest.mark.parametrize(
    ("points", "size", "seconds"),
    [
        ([(8, 4.0)], 32, 4.0),
        ([(2, 1.0), (8, 4.0)], 32, 16.0),
        ([(2, 3.0), (8, 4.0)], 32, 8.0),  # fixed costs
        ([(2, 9.0), (8, 4.0)], 32, 4.0),  # the small one was disturbed
        ([(2, 0.1), (8, 8.0)], 128, 128.0),  # the large one was: no more than in proportion
    ],
)
def test_a_line_is_held_between_no_growth_and_proportion(points, size, seconds):
    assert at_size(points, size) == pytest.approx(seconds)


def test_the_real_clock_and_no_readings():
    assert read_clock() - read_clock() <= (0.0, 0.0)
    assert Timed().ran == 1.0
    assert Timed([Moment(2.0, 5.0)]).ran == 1.0
    assert REPEATS >= 3
