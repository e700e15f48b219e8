"""Terms and Context: what an objective returns and what it may know.

The trainer reduces sum(weights * values) / sum(weights) over the whole global update, so accumulation, uneven
ranks and token counts cannot bias a loss. Shapes: R terms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from vlm.types.batch import Batch
from vlm.types.communicator import Communicator

Scope = Literal["sample", "batch"]
"""`sample`: a term depends on its own sample alone. `batch`: on the whole global update (negatives)."""


@dataclass(frozen=True)
class Terms:
    """values [R] float32; weights [R] float32, no gradient, 0 removes a term; sample_index [R] int64.

    scalars: detached numbers for the log (accuracy, temperature, ...), averaged over the update by weight.
    """

    values: Tensor
    weights: Tensor
    sample_index: Tensor
    scalars: Mapping[str, float | Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (self.values.shape == self.weights.shape == self.sample_index.shape) or self.values.dim() != 1:
            raise ValueError(
                f"Terms: values {tuple(self.values.shape)}, weights {tuple(self.weights.shape)} and "
                f"sample_index {tuple(self.sample_index.shape)} must be one vector each of the same length"
            )
        if self.weights.requires_grad:
            raise ValueError("Terms.weights must carry no gradient")

    def total(self) -> Tensor:
        """sum(weights * values), a scalar. A term of weight 0 contributes 0 even if its value is not finite."""
        live = self.weights != 0
        return (self.values[live] * self.weights[live]).sum()


@dataclass(frozen=True)
class Context:
    """What an objective may know beyond the views.

    batch: the samples behind the views. progress: 0..1 over the stage. step: updates done in the stage.
    draw_seed: seed of this update's own randomness (key further draws by purpose and sample).
    """

    batch: Batch
    communicator: Communicator
    step: int = 0
    progress: float = 0.0
    draw_seed: int = 0
