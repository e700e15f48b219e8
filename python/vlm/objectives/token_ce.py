"""Cross-entropy over the vocabulary. n rows, T positions, V ids, R supervised targets, B samples.

Sources: every language model, ctp (masked unit), dynloss (one value a sample), liquid (report by modality).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.vocabulary import (
    Positions,
    Unit,
    batch_layout,
    cross_entropy_of,
    exact,
    factors_of,
    sample_counts,
    sample_sums,
    targets_of,
)
from vlm.types import Batch, Context, Layout, Request, Terms, Views, Vocabulary
from vlm.types.layout import Modality

REPORTED = {Modality.TEXT: "text", Modality.IMAGE_CODE: "image_code"}
"""Modalities that a vocabulary can name. Every rank reports all of them, also where it has no target of one."""


class TokenCrossEntropyOptions(ObjectiveOptions):
    """Prediction of supervised tokens, the next one or the one that was masked."""

    kind: Literal["token-ce"] = "token-ce"
    name: str = "token-ce"
    stream: str = Field("text", description="stream of token ids; TEXT@PICTURES reads it with another picture stream")
    unit: Unit = Field("causal", description="causal: the next token of the document; masked: the position itself")
    per: Literal["token", "sample"] = Field(
        "token", description="one term a supervised token, or one a sample: the mean over its tokens"
    )
    report: Literal["none", "modality"] = Field("none", description="modality: log what text and image codes bring to `nats`")
    spans: tuple[str, ...] = Field(
        (), description="spans of the vocabulary among whose ids alone a target is predicted; other targets are left out; default: all ids"
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log normaliser")

    def build(self, context: BuildContext) -> TokenCrossEntropy:
        known = context.model.vocabulary.spans if self.spans else {}
        for name in self.spans:
            if name not in known:
                raise ValueError(f"objective {self.name!r}: the vocabulary has no span {name!r} (there are: {', '.join(sorted(known))})")
        return TokenCrossEntropy(self, context.model.vocabulary.allowed(*self.spans) if self.spans else None)


class TokenCrossEntropy(Objective):
    """-log p(target) by `vlm.ops.linear_cross_entropy`: logits [n T, V] never exist at once."""

    allowed: Tensor | None

    def __init__(self, options: TokenCrossEntropyOptions, allowed: Tensor | None = None) -> None:
        """allowed [V] bool: the ids that may be predicted, None for all."""
        super().__init__()
        self.options = options
        self.requires = (Request.parse(f"model/{options.stream}.vocabulary"),)
        self.register_buffer("allowed", allowed, persistent=False)

    def count(self, batch: Batch) -> Tensor:
        targets = self._targets(batch_layout(batch, self.options.stream))
        counted = len(targets) if self.options.per == "token" else len(targets.sample_index.unique())
        return torch.tensor(float(counted), dtype=torch.float64)

    def _targets(self, layout: Layout) -> Positions:
        targets = targets_of(layout, self.options.unit)
        if self.allowed is None:
            return targets
        return targets[self.allowed.to(layout.label.device)[targets.told(layout.label)]]

    def forward(self, views: Views, context: Context) -> Terms:
        """token: values [R], one a supervised target. sample: values [B], weight 0 for a sample without target.

        Scalar `nats` is the plain cross-entropy, reduced alike, without smoothing or z-loss. With `report`, `nats_NAME` is what the
        targets of a modality add to it, so that these sum to `nats`, and `share_NAME` the part of its weight that they hold: the mean
        over a modality is their quotient, exact over micro-batches and ranks.
        """
        vocabulary, layout = factors_of(views[f"model/{self.options.stream}"])
        targets = self._targets(layout)
        hidden, ids = targets.of(vocabulary.hidden), targets.told(layout.label)
        index, samples = targets.sample_index, len(context.batch)
        if self.options.per == "token":
            values, nats = self._losses(vocabulary, hidden, ids)
            weights = share = torch.ones_like(nats)
        else:
            counts = sample_counts(index, samples)
            # Weighted inside, so that equal samples give every position the same upstream gradient.
            share = 1 / counts.to(exact(hidden))[index]
            values, nats = self._losses(vocabulary, hidden, ids, share)
            values, weights = sample_sums(values, index, samples), (counts > 0).to(nats)
            index = torch.arange(samples, device=index.device)
        total = weights.sum().clamp(min=1)
        scalars = {"nats": (share * nats).sum() / total}
        if self.options.report == "modality":
            scalars |= self._report(targets.told(layout.modality), share / total, nats)
        return Terms(values=values, weights=weights, sample_index=index, scalars=scalars)

    def _losses(
        self, vocabulary: Vocabulary, hidden: Tensor, ids: Tensor, share: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        allowed, size = self.allowed, vocabulary.weight.shape[0]
        if allowed is not None:
            # A table may be longer than the vocabulary, for the sake of its shape.
            allowed = torch.nn.functional.pad(allowed, (0, size - len(allowed)))
        return cross_entropy_of(
            vocabulary,
            hidden,
            ids,
            smoothing=self.options.smoothing,
            z_loss=self.options.z_loss,
            allowed=allowed,
            token_weights=share,
        )

    def _report(self, modality: Tensor, share: Tensor, nats: Tensor) -> dict[str, Tensor]:
        found = {}
        for kind, name in REPORTED.items():
            own = torch.where(modality == kind, share, 0.0)
            found[f"nats_{name}"], found[f"share_{name}"] = (own * nats).sum(), own.sum()
        return found
