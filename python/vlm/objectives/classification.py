"""Classification by a linear head over an embedding. B samples, E width, K classes. Sources: linear probe of clip, gpt4image."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm.data.samples import group_id
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Request, Terms, Views


class ClassificationOptions(ObjectiveOptions):
    """Cross-entropy of a learned linear head; the data groups samples by the same field (`data.group_by`)."""

    kind: Literal["classification"] = "classification"
    name: str = "classification"
    stream: str = Field("image", description="stream whose embedding is classified")
    field: str = Field("category", description="field of the data that holds the class")
    normalise: bool = Field(True, description="the head reads unit vectors")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")

    def classes_field(self) -> str | None:
        return self.field

    def build(self, context: BuildContext) -> Classification:
        if not context.classes.get(self.field):
            raise ValueError(f"objective {self.name!r}: the data has no field {self.field!r} to take classes from")
        return Classification(self, list(context.classes[self.field]), int(getattr(context.model.options, "embed_dim")))  # noqa: B009


class Classification(Objective):
    """values [B]; a sample without a known class has weight 0."""

    ids: Tensor

    def __init__(self, options: ClassificationOptions, classes: list[str], width: int) -> None:
        super().__init__()
        self.options = options
        self.classes = classes
        self.requires = (Request.parse(f"model/{options.stream}.embedding"),)
        self.reads = ("group",)
        self.register_buffer("ids", torch.tensor([group_id(name) for name in classes]), persistent=False)
        self.head = nn.Linear(width, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def labels(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(class index [B], known [B])"""
        groups = batch["group"]
        hit = groups.values[:, None] == self.ids[None]
        return hit.to(torch.int64).argmax(1), hit.any(1) & groups.mask

    def count(self, batch: Batch) -> Tensor:
        return self.labels(batch)[1].sum().double()

    def forward(self, views: Views, context: Context) -> Terms:
        view = views[f"model/{self.options.stream}"]
        labels, known = self.labels(context.batch)
        assert view.embedding is not None
        x = view.embedding.to(self.head.weight.dtype)
        logits = self.head(F.normalize(x, dim=-1) if self.options.normalise else x)
        values = F.cross_entropy(logits, labels, reduction="none", label_smoothing=self.options.smoothing)
        hits = (logits.detach().argmax(-1) == labels) & known
        return Terms(
            values,
            known.to(values.dtype),
            view.sample_index,
            scalars={"top1": 100 * hits.sum() / known.sum().clamp(min=1)},
        )
