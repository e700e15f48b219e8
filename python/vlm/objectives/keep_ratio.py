"""The share of visual tokens that a learned choice keeps, brought to its target. n rows. Source: core-select (LaVIT)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Request, Terms, Views


class KeepRatioOptions(ObjectiveOptions):
    """Mean over a row's pictures of (ratio - kept share)^2; the ratio is that of the step (`tokens.pre`)."""

    kind: Literal["keep-ratio"] = "keep-ratio"
    name: str = "keep-ratio"
    stream: str = Field("text", description="stream of texts whose pictures are reduced")

    def build(self, context: BuildContext) -> KeepRatio:
        if not len(getattr(context.model, "reducers", ())):
            raise ValueError('the model has no learned choice: set model.tokens.pre with score "learned-mlp"')
        return KeepRatio(self)


class KeepRatio(Objective):
    """values [n], one a row of texts."""

    def __init__(self, options: KeepRatioOptions) -> None:
        super().__init__()
        self.options = options
        self.requires = (Request.parse(f"model/{options.stream}.statistics"),)
        self.reads = (options.stream,)

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(float(len(batch[self.options.stream])), dtype=torch.float64)

    def forward(self, views: Views, context: Context) -> Terms:
        view = views[f"model/{self.options.stream}"]
        kept = view.statistics["kept_share"]
        values = view.statistics.get("ratio_penalty", torch.zeros_like(kept))  # a micro-batch without pictures has none
        return Terms(values, torch.ones_like(values), view.sample_index, scalars={"penalty": values.detach().mean()})
