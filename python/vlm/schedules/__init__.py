"""What changes over a run: learning rates, ramps of any scalar, durations with explicit units."""

from vlm.schedules.duration import Duration, in_steps, interval_in_steps
from vlm.schedules.learning_rate import LearningRateOptions, rate_factor
from vlm.schedules.ramp import Ramp, Scalar, value_at

__all__ = ["Duration", "LearningRateOptions", "Ramp", "Scalar", "in_steps", "interval_in_steps", "rate_factor", "value_at"]
