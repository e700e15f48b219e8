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
    targets: Literal["diagonal", "groups", "multi", "slots", "listed"] = Field(
        "diagonal",
        description="positives: the own pair; every pair whose `group` is equal; all columns of the own sample, alike; one a slot, "
        "averaged; all columns of the own sample with their `shares`",
    )
    shares: str | None = Field(
        None, description="listed: stream of one number a column; softmax: their parts of the sample's sum; sigmoid: the labels, up to 1"
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target spread over all pairs; sigmoid: labels 1 - eps and eps")
    smooth_by: str | None = Field(
        None,
        description="stream of one number a sample in 0..1 (how likely its pair is noise) that smoothing is multiplied by; "
        "sigmoid: labels 1 - eps and 0; none: 1",
    )
    teacher: str | None = Field(None, description="companion whose similarities are soft targets; none: no soft targets")
    teacher_share: float = Field(1.0, ge=0, le=1, description="share of the teacher in the target")
    teacher_scale: float | None = Field(None, gt=0, description="scale of the teacher's cosine; none: that of the loss")
    teacher_top: int = Field(
        0, ge=0, description="only so many pairs of a row, and of a column, have a share of the teacher: its likeliest; 0: all pairs"
    )
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
            "smooth_by scales smoothing, which is 0": self.smooth_by is not None and self.smoothing == 0,
            'targets = "listed" and shares go together': (self.targets == "listed") != (self.shares is not None),
            'targets = "listed" is of similarity "global" or "token-mean"': self.targets == "listed" and not pooled,
            'targets = "listed" of form = "sigmoid" goes with neither smoothing nor negative_weight': self.targets == "listed"
            and self.form == "sigmoid" and (self.smoothing > 0 or self.negative_weight != 1),
            'teacher_top wants a teacher, similarity "global" or "token-mean", targets "diagonal" or "slots", and goes with neither '
            'exclude, negative_weight nor gather = "ring"': self.teacher_top > 0
            and not (self.teacher is not None and pooled and self.targets in ("diagonal", "slots") and self.exclude == "none"
                     and self.negative_weight == 1 and self.gather != "ring"),
            "teacher and exclude_similar do not go together": self.teacher is not None and self.exclude_similar is not None,
            'exclude = "group" wants targets = "diagonal"': self.exclude == "group" and self.targets != "diagonal",
            'keys names a companion for a queue, and there is none: set queue': self.keys != "model" and self.queue == 0,
        }
        for message, wrong in refused.items():
            if wrong:
                raise ValueError(message)
        self.read_only_where(self.similarity == "mutual-guided", 'similarity = "mutual-guided"', "sharpness")
        self.read_only_where(self.teacher is not None, "a teacher is named", "teacher_share", "teacher_scale")
        return self
