"""Answers token by token, in NumPy alone: greedy, sampled, by beams, with a second branch; and calibrated labels.

`generate` and `stream` drive any `Generator` over its `Stepper`; `Rolling` does for answers that begin and end at any time.
"""

from vlm.runtime.generation.branches import Branches, Negatives, with_unknown, without_pictures
from vlm.runtime.generation.calibration import (
    Answers,
    Calibration,
    answer,
    calibrate,
    label_ids,
    label_probabilities,
)
from vlm.runtime.generation.events import Event, FinishReason
from vlm.runtime.generation.loop import Completion, generate, stream
from vlm.runtime.generation.protocols import Generator, Prompt, Stepper
from vlm.runtime.generation.rolling import Failed, Request, Rolling
from vlm.runtime.generation.settings import Contrast, Decoding, NegativeKind, Strategy

__all__ = [
    "Answers",
    "Branches",
    "Calibration",
    "Completion",
    "Contrast",
    "Decoding",
    "Event",
    "Failed",
    "FinishReason",
    "Generator",
    "NegativeKind",
    "Negatives",
    "Prompt",
    "Request",
    "Rolling",
    "Stepper",
    "Strategy",
    "answer",
    "calibrate",
    "generate",
    "label_ids",
    "label_probabilities",
    "stream",
    "with_unknown",
    "without_pictures",
]
