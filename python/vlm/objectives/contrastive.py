"""Contrastive objective: matched pairs against all other pairs of the update.

B pairs, E embedding width. Sources: clip, siglip, core-infonce, core-siglip.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.models.blocks import normalise
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Context, Outputs, Request, Terms, Views
from vlm.types.terms import Scope


class ContrastiveOptions(ObjectiveOptions):
    """Global similarity of two streams; softmax (CLIP) or sigmoid (SigLIP) form."""

    kind: Literal["contrastive"] = "contrastive"
    name: str = "contrastive"
    form: Literal["softmax", "sigmoid"] = "softmax"
    rows: str = Field("image", description="stream of the rows")
    columns: str = Field("text", description="stream of the columns")
    targets: Literal["diagonal", "groups"] = Field(
        "diagonal", description="positives: the own pair, or every pair whose `group` label is equal"
    )
    temperature: Literal["model", "own"] | float = Field(
        "model", description="the model's scale (and bias), one of the objective's own, or a fixed temperature"
    )

    def build(self, context: BuildContext) -> ContrastiveObjective:
        return ContrastiveObjective(self)


class ContrastiveObjective(Objective):
    """One value a pair: the mean of its row's and its column's loss."""

    scope: Scope = "batch"

    def __init__(self, options: ContrastiveOptions) -> None:
        super().__init__()
        self.options = options
        self.requires = tuple(
            Request.parse(f"model/{stream}.embedding") for stream in (options.rows, options.columns)
        )
        self.reads = ("group",) if options.targets == "groups" else ()
        if options.temperature == "own":
            sigmoid = options.form == "sigmoid"
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0 if sigmoid else 1 / 0.07)))
            self.own_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None

    def temperature(self, view: Outputs) -> tuple[Tensor, Tensor]:
        """(log scale, bias)"""
        setting = self.options.temperature
        if setting == "own":
            zero = torch.zeros(()) if self.own_bias is None else self.own_bias
            return self.log_scale, zero
        if setting == "model":
            if view.log_scale is None:
                raise ValueError('temperature = "model", but the model has no similarity scale; use "own" or a number')
            return view.log_scale, torch.zeros(()) if view.bias is None else view.bias
        return torch.tensor(-math.log(float(setting))), torch.zeros(())

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B] >= 0, weight 1; a pair with a masked side is left out."""
        left, right = views[f"model/{self.options.rows}"], views[f"model/{self.options.columns}"]
        if not torch.equal(left.sample_index, right.sample_index):
            raise ValueError(
                f"streams {self.options.rows!r} and {self.options.columns!r} must have one row a sample, in the same order"
            )
        assert left.embedding is not None
        assert right.embedding is not None
        live = left.mask & right.mask
        x, y = normalise(left.embedding[live]), normalise(right.embedding[live])
        log_scale, bias = self.temperature(left)
        groups = context.batch["group"].values[live] if self.options.targets == "groups" else None
        log_scale, bias = log_scale.to(x).reshape(()), bias.to(x).reshape(())
        if self.options.form == "softmax":
            rows, columns = ops.contrastive_softmax(x, y, log_scale, groups_x=groups, groups_y=groups)
        else:
            rows, columns = ops.contrastive_sigmoid(x, y, log_scale, bias, groups_x=groups, groups_y=groups)
        values = 0.5 * (rows + columns)
        return Terms(
            values=values,
            weights=torch.ones_like(values.detach()),
            sample_index=left.sample_index[live],
            scalars={"scale": log_scale.detach().exp()},
        )
