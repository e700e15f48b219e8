"""Options of the contrastive objective."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.objectives.base import ObjectiveOptions

Sides = Literal["both", "rows", "columns"]


class ContrastiveFields(ObjectiveOptions):
    """The fields, and which of them go together."""

    kind: Literal["contrastive"] = "contrastive"
    name: str = "contrastive"
    form: Literal["softmax", "sigmoid"] = "softmax"
    rows: str = Field("image", description="stream of the rows")
    columns: str = Field("text", description="stream of the columns")
    similarity: Literal["global", "token-mean", "late-max", "mutual-guided"] = Field(
        "global",
        description="cosine of pooled vectors or of token means; best match of each token (FILIP); tokens weighed by the other side",
    )
    keep_ratio: float = Field(1.0, gt=0, le=1, description="late-max: share of tokens kept, the best matches of the micro-batch")
    aggregate: Literal["mean", "sum"] = Field("mean", description="late-max: over a sample's tokens")
    sharpness: float = Field(100.0, ge=0, description="mutual-guided: of its softmaxes")
    targets: Literal["diagonal", "groups", "multi", "slots"] = Field(
        "diagonal",
        description="positives: the own pair; every pair whose `group` is equal; all columns of the own sample; one a slot, averaged",
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all pairs; sigmoid: labels 1 - eps and eps")
    teacher: str | None = Field(None, description="companion whose similarities are soft targets; none: no soft targets")
    teacher_share: float = Field(1.0, ge=0, le=1, description="share of the teacher in the target")
    teacher_scale: float | None = Field(None, gt=0, description="scale of the teacher's cosine; none: that of the loss")
    exclude: Literal["none", "group"] = Field("none", description="group: other pairs whose `group` is equal take no part")
    exclude_similar: float | None = Field(
        None, gt=-1, description="pairs whose columns have a cosine above this take no part (CLOC); none: all do"
    )
    decoupled: bool = Field(False, description="softmax: positives take no part in the denominators (DCL)")
    queue: int = Field(0, ge=0, description="softmax: further negatives, embeddings of the last updates")
    keys: str = Field("model", description="companion whose embeddings fill the queue")
    negative_weight: float = Field(1.0, ge=0, description="sigmoid: factor of the terms of pairs that are not positive")
    direction: Sides = Field("both", description="which losses count: of the rows, of the columns, their mean")
    gradient: Sides = Field("both", description="which embeddings get a gradient")
    weights: str | None = Field(None, description="stream of one weight a sample; none: 1")
    gather: Literal["all", "ring", "none"] = Field(
        "all", description="negatives: the whole update, gathered; one micro-batch of every rank, passed around; one micro-batch"
    )
    temperature: Literal["model", "own"] | float = Field(
        "model", description="the model's scale (and bias), one of the objective's own, or a fixed temperature"
    )

    @model_validator(mode="after")
    def _combination(self) -> ContrastiveFields:
        pooled = self.similarity in ("global", "token-mean")
        one_row = self.targets in ("diagonal", "groups")
        refused = {
            'keep_ratio and aggregate are of similarity = "late-max"': self.similarity != "late-max"
            and (self.keep_ratio != 1 or self.aggregate != "mean"),
            'decoupled is of form = "softmax"': self.decoupled and self.form == "sigmoid",
            'negative_weight is of form = "sigmoid"': self.negative_weight != 1 and self.form == "softmax",
            'queue is of form = "softmax", similarity "global" or "token-mean", targets "diagonal" or "groups", gather = "all" and '
            "goes with neither teacher nor exclude_similar": self.queue > 0
            and not (self.form == "softmax" and pooled and one_row and self.gather == "all" and self.teacher is None
                     and self.exclude_similar is None),
            'gather = "ring" is of similarity "global" or "token-mean", targets "diagonal" or "groups", and goes with neither '
            "exclude_similar nor negative_weight; smoothing is of its softmax form": self.gather == "ring"
            and not (pooled and one_row and self.exclude_similar is None and self.negative_weight == 1
                     and not (self.form == "sigmoid" and self.smoothing)),
            "teacher and exclude_similar do not go together": self.teacher is not None and self.exclude_similar is not None,
            'exclude = "group" wants targets = "diagonal"': self.exclude == "group" and self.targets != "diagonal",
            'keys names a companion for a queue, and there is none: set queue': self.keys != "model" and self.queue == 0,
        }
        for message, wrong in refused.items():
            if wrong:
                raise ValueError(message)
        return self
