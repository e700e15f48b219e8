"""What every task's options share."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from vlm.config.options import Options
from vlm.evaluation.bootstrap import RESAMPLES

Needs = Literal["pictures", "classifier", "tokens", "generator"]
"""pictures: an embedder and samples with pictures; classifier: a model with classes of its own and such samples; tokens: a language
model and texts; generator: a model that reads pictures and writes, and samples with pictures."""

Fields = str | tuple[str, ...]
"""One data field, or several of which the first that the data has is taken."""


def as_fields(fields: Fields) -> tuple[str, ...]:
    return (fields,) if isinstance(fields, str) else fields


class Task(Options):
    """One entry of `[[evaluation.tasks]]`; `task` says which."""

    name: str | None = Field(None, description="name in metrics and reports; default: the task")
    data: str | None = Field(None, description="data of this task; default: the run's validation data")
    limit: int | None = Field(None, gt=0, description="evaluate at most this many samples")
    seed: int = Field(0, ge=0, description="seed of bootstrap, folds and the choice of examples")
    resamples: int = Field(RESAMPLES, ge=100, description="bootstrap replicates of the 95% intervals")
    examples: int = Field(
        0, ge=0, le=1000, description="keep this many randomly chosen examples for the report"
    )
    needs: ClassVar[Needs] = "pictures"
    task: str

    @property
    def title(self) -> str:
        return self.name or self.task
