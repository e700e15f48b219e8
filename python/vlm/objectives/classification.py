"""Classification by a linear head over an embedding. B samples, E width, K classes. Sources: linear probe of clip, gpt4image."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Request, Terms, Views


class ClassificationOptions(ObjectiveOptions):
    """Cross-entropy of a learned linear head against the `label` stream (`data.label` names its field)."""

    kind: Literal["classification"] = "classification"
    name: str = "classification"
    stream: str = Field("image", description="stream whose embedding is classified")
    normalise: bool = Field(True, description="the head reads unit vectors")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")

    def build(self, context: BuildContext) -> Classification:
        if not context.classes:
            raise ValueError("it needs the classes of a field: set data.label")
        return Classification(self, list(context.classes), int(getattr(context.model.options, "embed_dim")))  # noqa: B009


class Classification(Objective):
    """values [B]; a sample without a known class has weight 0."""

    def __init__(self, options: ClassificationOptions, classes: list[str], width: int) -> None:
        super().__init__()
        self.options = options
        self.classes = classes
        self.requires = (Request.parse(f"model/{options.stream}.embedding"),)
        self.reads = ("label",)
        self.head = nn.Linear(width, len(classes))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def count(self, batch: Batch) -> Tensor:
        return batch["label"].mask.sum().double()

    def forward(self, views: Views, context: Context) -> Terms:
        view, labels = views[f"model/{self.options.stream}"], context.batch["label"]
        assert view.embedding is not None
        x = view.embedding.to(self.head.weight.dtype)
        logits = self.head(F.normalize(x, dim=-1) if self.options.normalise else x)
        values = F.cross_entropy(
            logits, labels.values.clamp(min=0), reduction="none", label_smoothing=self.options.smoothing
        )
        hits = (logits.detach().argmax(-1) == labels.values) & labels.mask
        return Terms(
            values,
            labels.mask.to(values.dtype),
            view.sample_index,
            scalars={"top1": 100 * hits.sum() / labels.mask.sum().clamp(min=1)},
        )
