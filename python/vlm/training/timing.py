"""Times of a few repeated steps: on the clock, and of them on a core."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Moment(NamedTuple):
    """Of a point in time, or between two: seconds on the clock, and seconds in which this thread ran."""

    seconds: float
    ran_for: float

    def __sub__(self, other: Moment) -> Moment:
        return Moment(self.seconds - other.seconds, self.ran_for - other.ran_for)


def read_clock() -> Moment:
    """Now. The difference of two is what lies between them."""
    return Moment(time.perf_counter(), time.thread_time())


@dataclass
class Timed:
    """Readings of the same step."""

    readings: list[Moment] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.readings)

    def add(self, reading: Moment) -> None:
        self.readings.append(reading)

    @property
    def seconds(self) -> float:
        """Of all together."""
        return sum(reading.seconds for reading in self.readings)

    @property
    def ran(self) -> float:
        """Share of the seconds in which this thread ran; 1 where nothing was measured. The waiting of a thread for its own helpers
        counts as running, since they are waited for busily."""
        return min(1.0, sum(reading.ran_for for reading in self.readings) / self.seconds) if self.seconds > 0 else 1.0

    def median(self) -> float:
        return statistics.median(reading.seconds for reading in self.readings)

    def least(self) -> float:
        return min(reading.seconds for reading in self.readings)

    def greatest(self) -> float:
        return max(reading.seconds for reading in self.readings)


def at_size(points: Sequence[tuple[int, float]], size: int) -> float:
    """Seconds at another size by a straight line through one or two (size, seconds), ascending.

    Other work shakes the line, so it is held between the two that a step can have: no growth, and growth in proportion.
    """
    most, seconds = points[-1]
    if len(points) == 1:
        return seconds
    less, fewer = points[0]
    each = min(max(0.0, (seconds - fewer) / (most - less)), seconds / most)
    return seconds + each * (size - most)
