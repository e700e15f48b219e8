"""Replaced-token detection. n rows, N positions. Source: budget-longformer (the objective is ELECTRA's)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.vocabulary import batch_layout
from vlm.types import Batch, Context, Request, Terms, Views


class ReplacedTokenOptions(ObjectiveOptions):
    """The generator's cross-entropy of hidden tokens, and the encoder's telling of every token whether it is the text's own."""

    kind: Literal["replaced-token"] = "replaced-token"
    name: str = "replaced-token"
    stream: str = Field("text", description="stream of token ids")
    balance: float = Field(50.0, ge=0, description="factor of the detection loss beside the generator's")

    def build(self, context: BuildContext) -> ReplacedToken:
        options: Any = context.model.options
        replaced = getattr(options, "replaced", None)
        if replaced is None:
            raise ValueError("it needs an encoder with a generator: kind language, causal = false, and [model.replaced]")
        return ReplacedToken(self, replaced.hidden)


class ReplacedToken(Objective):
    """values [n]: (sum of nats of hidden tokens / share hidden + balance * sum of detection losses) / tokens; weights: tokens.

    So an update sums detection over all its tokens and divides by their number, and the generator's part is the mean over hidden
    tokens but for the noise of how many are hidden. Padding counts nowhere.
    """

    def __init__(self, options: ReplacedTokenOptions, hidden: float) -> None:
        super().__init__()
        self.options, self.hidden = options, hidden
        self.requires = (Request.parse(f"model/{options.stream}.statistics"),)
        self.reads = (options.stream,)

    def count(self, batch: Batch) -> Tensor:
        """Tokens."""
        return batch_layout(batch, self.options.stream).mask.sum().double()

    def forward(self, views: Views, context: Context) -> Terms:
        view = views[f"model/{self.options.stream}"]
        found, layout = view.statistics, view.layout
        assert layout is not None
        mask = layout.mask
        wrong = found["replaced"] & mask
        detection = F.binary_cross_entropy_with_logits(found["detection"], wrong.float(), reduction="none") * mask
        tokens = mask.sum(1).float()
        total = found["nats"].sum(1) / self.hidden + self.options.balance * detection.sum(1)
        hidden, said = found["hidden"], found["detection"] > 0
        scalars = {
            "generator_nats": (found["nats"].sum() / hidden.sum().clamp(min=1)).detach(),
            "detection": (detection.sum() / tokens.sum().clamp(min=1)).detach(),
            "replaced": wrong.sum() / tokens.sum().clamp(min=1),
            "recall": (said & wrong).sum() / wrong.sum().clamp(min=1),
            "precision": (said & wrong).sum() / (said & mask).sum().clamp(min=1),
        }
        return Terms(total / tokens.clamp(min=1), tokens, layout.sample_index, {k: torch.as_tensor(v).float() for k, v in scalars.items()})
