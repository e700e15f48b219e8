"""The `[model.tokens]` table: which positions of pictures a model drops or merges, before its decoder and inside it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.tokens.pre import PreStepOptions
from vlm.tokens.reducer import TokenReducer
from vlm.tokens.schedule import KeepPlan, ScheduleOptions
from vlm.tokens.score_options import AttentionFromRowsOptions, DecoderScore
from vlm.types import Layout


class TopKOptions(Options):
    """The best of each picture, as many as `keep` says; equal scores go to the lower position."""

    kind: Literal["top-k"] = "top-k"


class ThresholdOptions(Options):
    """Of the best, as many as `keep` says, those whose score reaches so many times the mean of their picture's."""

    kind: Literal["threshold"] = "threshold"
    times: float = Field(1.0, gt=0, description="times the mean score of the picture's positions that are left")


class GatherOptions(Options):
    """The sequence is cut; what stays keeps its order."""

    kind: Literal["gather"] = "gather"
    positions: Literal["renumber", "keep"] = Field("renumber", description="renumber: counted from 0 again; keep: as before the drop")


class TokensOptions(Options):
    """Positions of pictures are dropped inside the decoder, when a prompt is read and in training, and before it."""

    at: Literal["decoder"] = "decoder"
    when: Literal["always", "inference"] = Field(
        "always", description="inference: a training step reads everything, and only evaluation, generation and bundles read less"
    )
    pre: list[PreStepOptions] = Field([], description="steps before the decoder, after the connector, in order")
    score: DecoderScore = AttentionFromRowsOptions()
    select: Annotated[TopKOptions | ThresholdOptions, Field(discriminator="kind")] = TopKOptions()
    apply: Annotated[GatherOptions, Field()] = GatherOptions()
    keep: ScheduleOptions | None = Field(None, description="how much each layer of the decoder reads; none: all")

    @model_validator(mode="before")
    @classmethod
    def _stages_unless_said(cls, values: Any) -> Any:
        """Presets from when `stages` was the only schedule may leave its kind out."""
        keep = values.get("keep") if isinstance(values, dict) else None
        return {**values, "keep": {"kind": "stages", **keep}} if isinstance(keep, dict) and "kind" not in keep else values

    @model_validator(mode="after")
    def _does_something(self) -> TokensOptions:
        if self.keep is None and not self.pre:
            raise ValueError("expected keep, pre or both: without them nothing is dropped")
        self.read_only_where(self.keep is not None, "keep says how much each layer reads", "score", "select", "apply")
        for number, step in enumerate(self.pre):
            if step.learned and self.when == "inference":
                raise ValueError(f'pre.{number}: a learned choice is learned in training: set when = "always"')
            if number and step.needs_grid:
                raise ValueError(f"pre.{number}: only the first step may read the tower's attention or rows of the grid")
        return self

    def plan(self, depth: int) -> KeepPlan:
        """What the layers of a decoder keep. Raises ValueError where the schedule does not fit its depth."""
        return KeepPlan({}) if self.keep is None else self.keep.plan(depth)

    def left(self, tokens: int) -> int:
        """Visual tokens of a picture that come out of the steps before the decoder, at most."""
        for step in self.pre:
            tokens = step.count(tokens)
        return tokens

    def reducer(self, layout: Layout, depth: int) -> TokenReducer | None:
        """The reducer of one pass over rows of this layout, before any drop; None where no layer drops."""
        plan = self.plan(depth)
        if not plan.shares:
            return None
        at_least = self.select.times if isinstance(self.select, ThresholdOptions) else None
        return TokenReducer(layout, plan, self.score, renumber=self.apply.positions == "renumber", at_least=at_least)

    @property
    def unexportable(self) -> str | None:
        """Why a model with this table has no bundle; None where it has one."""
        if isinstance(self.select, ThresholdOptions) or any(step.select.kind == "threshold" for step in self.pre):
            return 'a threshold keeps another number of positions of every picture, and a graph has one: use select.kind = "top-k"'
        if any(step.learned for step in self.pre):
            return "a learned choice keeps another number of positions of every picture, and a graph has one"
        scores = [step.score for step in self.pre] + ([self.score] if self.keep is not None else [])
        if any(score is not None and score.kind == "random" for score in scores):
            return "a random order is a baseline and has no graph"
        return None
