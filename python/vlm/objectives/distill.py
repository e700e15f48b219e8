"""Distillation from a companion: features of one sample, or rows of similarities over the update.

B samples, E student width, F teacher width. Sources: llava-kd, ctp (similarity rows), salt, hovle (features).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm.models.blocks import normalise
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Request, Terms, Views


class DistillOptions(ObjectiveOptions):
    """`feature`: the student's embedding approaches the teacher's; `similarity`: its rows of similarities do."""

    kind: Literal["distill"] = "distill"
    name: str = "distill"
    target: Literal["feature", "similarity"] = "feature"
    teacher: str = Field("teacher", description="companion that teaches")
    streams: tuple[str, ...] = Field(("image", "text"), description="streams whose embeddings are matched")
    distance: Literal["cosine", "mse"] = Field("cosine", description="feature: 1 - cosine, or squared error of unit vectors")
    temperature: float = Field(0.07, gt=0, description="similarity: temperature of both softmaxes")

    def build(self, context: BuildContext) -> Objective:
        return FeatureDistill(self, context) if self.target == "feature" else SimilarityDistill(self)


def _requests(options: DistillOptions) -> tuple[Request, ...]:
    return tuple(
        Request.parse(f"{who}/{stream}.embedding") for who in ("model", options.teacher) for stream in options.streams
    )


class FeatureDistill(Objective):
    """One value a sample, the mean over streams. Widths that differ are bridged by a learned linear map."""

    def __init__(self, options: DistillOptions, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        self.requires = _requests(options)
        if options.teacher not in context.companions:
            raise ValueError(f"objective {options.name!r} needs [companions.{options.teacher}]")
        student = int(getattr(context.model.options, "embed_dim"))  # noqa: B009 - families without it are refused by `offers`
        teacher = int(getattr(context.companions[options.teacher].options, "embed_dim"))  # noqa: B009
        self.bridges = nn.ModuleDict(
            {} if student == teacher else {name: nn.Linear(student, teacher, bias=False) for name in options.streams}
        )

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B]; a sample masked in any stream has weight 0."""
        total: Tensor | None = None
        weights: Tensor | None = None
        for name in self.options.streams:
            student, teacher = views[f"model/{name}"], views[f"{self.options.teacher}/{name}"]
            assert student.embedding is not None
            assert teacher.embedding is not None
            x = student.embedding
            if name in self.bridges:
                bridge = self.bridges[name]
                assert isinstance(bridge, nn.Linear)
                x = bridge(x.to(bridge.weight.dtype))
            cosine = (normalise(x) * normalise(teacher.embedding)).sum(-1)
            value = 1 - cosine if self.options.distance == "cosine" else 2 - 2 * cosine
            live = (student.mask & teacher.mask).float()
            total = value if total is None else total + value
            weights = live if weights is None else weights * live
            index = student.sample_index
        assert total is not None
        assert weights is not None
        return Terms(total / len(self.options.streams), weights, index)

    def count(self, batch: Batch) -> Tensor:
        live = torch.ones(len(batch), dtype=torch.bool)
        for name in self.options.streams:
            mask = batch[name].mask
            live &= mask if mask.dim() == 1 else mask.any(1)
        return live.sum().double()


class SimilarityDistill(Objective):
    """KL(teacher row || student row) of softmaxed similarities between the two streams, both directions."""

    scope = "batch"

    def __init__(self, options: DistillOptions) -> None:
        super().__init__()
        if len(options.streams) != 2:
            raise ValueError(f"objective {options.name!r}: similarity rows need two streams, got {list(options.streams)}")
        self.options = options
        self.requires = _requests(options)

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B], the mean of the row's and the column's divergence."""
        logits = []
        first, second = self.options.streams
        live = views[f"model/{first}"].mask & views[f"model/{second}"].mask
        for who in ("model", self.options.teacher):
            left, right = views[f"{who}/{first}"].embedding, views[f"{who}/{second}"].embedding
            assert left is not None
            assert right is not None
            logits.append(normalise(left[live]) @ normalise(right[live]).T / self.options.temperature)
        student, teacher = logits
        values = student.new_zeros(student.shape[0])
        for s, t in ((student, teacher), (student.T, teacher.T)):
            values = values + 0.5 * F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        return Terms(values, torch.ones_like(values.detach()), views[f"model/{first}"].sample_index[live])
