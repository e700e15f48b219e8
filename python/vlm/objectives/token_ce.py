"""Cross-entropy over the vocabulary. n rows, T positions, V ids, R supervised targets, B samples.

A soft cap of the logits is the model's own (`Vocabulary.softcap`), so that what is trained is what is decoded.
Sources: every language model, core-ce, ctp (masked unit), dynloss (one value a sample), lwm (one a document), liquid (report by
modality).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.token_ce_weights import Per, Reduction, reduction_of, target_weights
from vlm.objectives.vocabulary import (
    Positions,
    Unit,
    batch_layout,
    cross_entropy_of,
    exact,
    factors_of,
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
    per: Per = Field(
        "token", description="one term a supervised token, or one a document of a packed row, or one a sample: the mean over its tokens"
    )
    weights: str | None = Field(
        None,
        description="stream of one weight a token of `stream`, or one a sample; a token of weight 0 is left out. Weights of tokens "
        "count within a document or sample, those of samples between them; none: 1",
    )
    report: Literal["none", "modality"] = Field("none", description="modality: log what text and image codes bring to `nats`")
    spans: tuple[str, ...] = Field(
        (), description="spans of the vocabulary among whose ids alone a target is predicted; other targets are left out; default: all ids"
    )
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log normaliser")
    gradients: Literal["forward", "recompute"] = Field(
        "forward", description="forward: made with the loss, a product less; recompute: in the backward pass, nothing kept between"
    )

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
        self.reads = () if options.weights is None else (options.weights,)
        self.register_buffer("allowed", allowed, persistent=False)

    def count(self, batch: Batch) -> Tensor:
        layout = batch_layout(batch, self.options.stream)
        return self._reduced(layout, batch, torch.float64)[1].weights.sum()

    def _reduced(self, layout: Layout, batch: Batch, dtype: torch.dtype) -> tuple[Positions, Reduction]:
        """The targets that count, and how their values become terms."""
        options = self.options
        targets = targets_of(layout, options.unit)
        weights, of_samples = None, False
        if options.weights is not None:
            weights = target_weights(batch, options.stream, options.weights, options.unit, targets)
            of_samples = batch[options.weights].values.dim() == 1
            some = weights > 0
            targets, weights = targets[some], weights[some]
        if self.allowed is not None:
            some = self.allowed.to(layout.label.device)[targets.told(layout.label)]
            targets, weights = targets[some], None if weights is None else weights[some]
        return targets, reduction_of(options.per, targets, layout, len(batch), weights, of_samples, dtype)

    def forward(self, views: Views, context: Context) -> Terms:
        """token: values [R], one a supervised target. document: one for each document with a target. sample: values [B], weight 0 for
        a sample without target.

        Scalar `nats` is the plain cross-entropy, reduced alike, without smoothing or z-loss. With `report`, `nats_NAME` is what the
        targets of a modality add to it, so that these sum to `nats`, and `share_NAME` the part of its weight that they hold: the mean
        over a modality is their quotient, exact over micro-batches and ranks.
        """
        vocabulary, layout = factors_of(views[f"model/{self.options.stream}"])
        hidden = vocabulary.hidden
        targets, reduction = self._reduced(layout, context.batch, exact(hidden[:0]).dtype)
        # Weighted inside, so that equal terms give every position the same upstream gradient.
        inside = None if reduction.group is None else reduction.share
        values, nats = self._losses(vocabulary, targets.of(hidden), targets.told(layout.label), inside)
        total = reduction.weights.sum()
        factors = reduction.factors / torch.where(total == 0, 1, total)
        scalars = {"nats": (factors * nats).sum()}
        if self.options.report == "modality":
            scalars |= self._report(targets.told(layout.modality), factors, nats)
        return Terms(reduction.terms(values), reduction.weights, reduction.sample_index, scalars=scalars)

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
            gradients=self.options.gradients,
        )

    def _report(self, modality: Tensor, share: Tensor, nats: Tensor) -> dict[str, Tensor]:
        found = {}
        for kind, name in REPORTED.items():
            own = torch.where(modality == kind, share, 0.0)
            found[f"nats_{name}"], found[f"share_{name}"] = (own * nats).sum(), own.sum()
        return found
