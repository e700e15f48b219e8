"""What every objective is to the trainer.

An objective of scope `sample` sees one micro-batch at a time and says beforehand how much weight it will give
(`count`), so that the trainer can divide by the weight of the whole update. An objective of scope `batch` sees the
whole global update at once: the trainer gathers its leaves over micro-batches and ranks, and replays the encoders.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.models import Model
from vlm.schedules import Scalar
from vlm.types import Batch, Context, Outputs, Request, Terms, Views
from vlm.types.terms import Scope


@dataclass(frozen=True)
class BuildContext:
    """What an objective may look at when it is made.

    classes: distinct values, sorted, of the field that `data.label` names; empty without one.
    """

    model: Model
    companions: Mapping[str, Model] = field(default_factory=dict)
    classes: Sequence[str] = ()


class ObjectiveOptions(Options):
    """What every entry of [[objectives]] has."""

    name: str = Field(description="how logs and overrides call it")
    weight: Scalar = Field(1.0, description="factor of the reduced loss; a number or a ramp over the stage")

    def build(self, context: BuildContext) -> Objective:
        """The objective itself. Raises ValueError for an impossible combination."""
        raise TypeError(f"{type(self).__name__} defines no build")


class Objective(nn.Module):
    """Base class; parameters and buffers it owns are trained and checkpointed with the run.

    scope: `sample` or `batch`. requires: what it reads of the views. reads: streams it reads of the batch itself.
    """

    scope: Scope = "sample"
    requires: tuple[Request, ...] = ()
    reads: tuple[str, ...] = ()
    lookahead: ClassVar[bool] = False

    def count(self, batch: Batch) -> Tensor:
        """Sum of the weights that `forward` will give for this batch, from the batch alone; scalar float64.

        Only asked of scope `sample`. The default is one per sample.
        """
        return torch.tensor(float(len(batch)), dtype=torch.float64)

    def prepare(self, views: Views, context: Context) -> Views:
        """Scope batch: the part that each sample can do alone, on one micro-batch. Embeddings and tokens of the
        result are what is gathered over the update (dreamlip reduces patch tokens to group vectors here).

        The default is what it requires, unchanged, and nothing that only another objective asked for.
        """
        wanted: dict[str, set[str]] = {}
        for request in self.requires:
            wanted.setdefault(request.view, set()).add(request.field)
        return Views({key: _only(views[key], wanted[key]) for key in sorted(wanted)})

    def commit(self, views: Views, context: Context) -> None:
        """After the optimiser's step, with the detached views of the whole update: where a queue moves (ctp)."""

    def forward(self, views: Views, context: Context) -> Terms:
        """The terms of a micro-batch (scope sample) or of the whole update (scope batch). Pure: it may run twice."""
        raise TypeError(f"{type(self).__name__} defines no forward")


def _only(outputs: Outputs, fields: Collection[str]) -> Outputs:
    """The outputs without an embedding or tokens that are not among `fields`: they would be gathered for nothing."""
    if "embedding" not in fields and outputs.embedding is not None:
        outputs = replace(outputs, embedding=None)
    if "tokens" not in fields and outputs.tokens is not None:
        outputs = replace(outputs, tokens=None, token_mask=None)
    return outputs
