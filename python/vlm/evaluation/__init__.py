"""Evaluation: tasks, metrics with intervals, and the catalogue of `[[evaluation.tasks]]`.

A new task is one file with an options class, and one entry here. Importing this package imports no torch.
"""

from typing import Annotated

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.evaluation.agreement import AgreementOptions
from vlm.evaluation.caption import CaptionOptions
from vlm.evaluation.classification import ClassificationTaskOptions
from vlm.evaluation.compositional import CompositionalOptions
from vlm.evaluation.cost import CostOptions
from vlm.evaluation.grounding import GroundingOptions
from vlm.evaluation.hallucination import HallucinationOptions
from vlm.evaluation.linear_probe import LinearProbeOptions
from vlm.evaluation.localisation import LocalisationOptions
from vlm.evaluation.perplexity import PerplexityOptions
from vlm.evaluation.preference import PreferenceTaskOptions
from vlm.evaluation.result import Result, save_results
from vlm.evaluation.retrieval import RetrievalOptions
from vlm.evaluation.session import check_tasks, evaluate, evaluate_in_memory, numbers_of
from vlm.evaluation.text_probe import TextProbeOptions
from vlm.evaluation.vqa import VqaOptions
from vlm.evaluation.zero_shot import ZeroShotOptions
from vlm.schedules.duration import Duration

TaskOptions = Annotated[
    RetrievalOptions
    | CompositionalOptions
    | ZeroShotOptions
    | LinearProbeOptions
    | ClassificationTaskOptions
    | PerplexityOptions
    | TextProbeOptions
    | CaptionOptions
    | VqaOptions
    | GroundingOptions
    | LocalisationOptions
    | HallucinationOptions
    | PreferenceTaskOptions
    | AgreementOptions
    | CostOptions,
    Field(discriminator="task"),
]


class EvaluationOptions(Options):
    """The `[evaluation]` table: what is measured on `data.val`, during a run and at its end."""

    every: Duration = Field(0, description="steps, share or epochs between evaluations; 0: only at the end")
    examples: int = Field(
        12, ge=0, le=1000, description="examples that each task keeps at the end, for the report, where it does not say its own number"
    )
    tasks: list[TaskOptions] = Field([], description="what is measured")

    @model_validator(mode="after")
    def _distinct_names(self) -> "EvaluationOptions":
        titles = [task.title for task in self.tasks]
        twice = sorted({title for title in titles if titles.count(title) > 1})
        if twice:
            raise ValueError(f"two tasks are called {twice[0]!r}, and their figures would be too; give each its own name")
        return self


__all__ = [
    "AgreementOptions",
    "CaptionOptions",
    "ClassificationTaskOptions",
    "CompositionalOptions",
    "CostOptions",
    "EvaluationOptions",
    "GroundingOptions",
    "HallucinationOptions",
    "LinearProbeOptions",
    "LocalisationOptions",
    "PerplexityOptions",
    "PreferenceTaskOptions",
    "Result",
    "RetrievalOptions",
    "TaskOptions",
    "TextProbeOptions",
    "VqaOptions",
    "ZeroShotOptions",
    "check_tasks",
    "evaluate",
    "evaluate_in_memory",
    "numbers_of",
    "save_results",
]
