"""Preference between two answers of one sample, measured against a reference (DPO).

B samples, R supervised targets of a view. Sources: povid, stic (the likelihood term).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from vlm.config.options import Options
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.vocabulary import (
    argmax_tokens,
    bare,
    batch_layout,
    factors_of,
    match,
    one_row_a_sample,
    sample_counts,
    sample_sums,
    target_log_probabilities,
    targets_of,
)
from vlm.types import Batch, Context, Request, Terms, Views


class TextRejected(Options):
    """Another answer of the same sample."""

    kind: Literal["text"] = "text"
    of: str = Field("answer.rejected", description="stream of the rejected answer")


class ArgmaxRejected(Options):
    """What a model itself would say at each target of the preferred answer, when it reads another picture."""

    kind: Literal["argmax"] = "argmax"
    chooser: str = Field(description="companion whose likeliest tokens the model is scored on")
    reference_chooser: str | None = Field(None, description="companion that chooses for the reference; default: the reference")
    of: str = Field(description="the preferred stream with the picture that they read, STREAM@PICTURES")


class PreferenceOptions(ObjectiveOptions):
    """The preferred answer must gain on the rejected one. The score of an answer is the sum of its log-probabilities."""

    kind: Literal["preference"] = "preference"
    name: str = "preference"
    loss: Literal["sigmoid", "hinge"] = Field("sigmoid", description="sigmoid: -log sigmoid(logit); hinge: max(0, 1 - logit)")
    beta: float = Field(0.1, gt=0, description="factor of the scores")
    reference: str | None = Field("reference", description='companion whose scores are taken off; "none": nothing is')
    preferred: str = Field("answer.preferred", description="stream of the preferred answer")
    rejected: Annotated[TextRejected | ArgmaxRejected, Field(discriminator="kind")] = TextRejected()
    nll: float = Field(0.0, ge=0, description="weight of -log p of the preferred answer")
    nll_norm: Literal["tokens"] | float = Field(
        1024.0, description="what divides -log p: a number (stic: the greatest length), or the answer's own count of tokens"
    )

    @model_validator(mode="after")
    def _weighed(self) -> PreferenceOptions:
        self.read_only_where(self.nll > 0, "nll is above 0", "nll_norm")
        if isinstance(self.rejected, ArgmaxRejected) and self.reference is None and self.rejected.reference_chooser is not None:
            raise ValueError('rejected.reference_chooser chooses for the reference, and reference is "none": leave it out')
        return self

    def build(self, context: BuildContext) -> Preference:
        return Preference(self, context)


@dataclass(frozen=True)
class Scores:
    """What one model says of both answers, all [B]. tokens: targets of the preferred answer; live: both have targets."""

    preferred: Tensor
    rejected: Tensor
    tokens: Tensor
    live: Tensor


class Preference(Objective):
    """One value a sample: the loss of logit = beta * [(preferred - rejected) - the same of the reference]."""

    def __init__(self, options: PreferenceOptions, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        rejected, who = options.rejected, ["model"] + ([] if options.reference is None else [options.reference])
        if not isinstance(options.nll_norm, str) and options.nll_norm <= 0:
            raise ValueError(f"objective {options.name!r}: nll_norm = {options.nll_norm:g}, expected a positive number")
        requests = [f"{name}/{options.preferred}.vocabulary" for name in who]
        self.choosers: dict[str, str] = {}
        if isinstance(rejected, TextRejected):
            if bare(rejected.of) == bare(options.preferred):
                raise ValueError(f"objective {options.name!r}: preferred and rejected are both {rejected.of!r}")
            requests += [f"{name}/{rejected.of}.vocabulary" for name in who]
        else:
            if bare(rejected.of) != bare(options.preferred):
                raise ValueError(
                    f"objective {options.name!r}: tokens chosen on {rejected.of!r} are laid on {options.preferred!r}; "
                    f"expected of = {bare(options.preferred) + '@PICTURES'!r}"
                )
            self.choosers["model"] = rejected.chooser
            if options.reference is not None:
                self.choosers[options.reference] = rejected.reference_chooser or options.reference
            requests += [f"{chooser}/{rejected.of}.vocabulary" for chooser in self.choosers.values()]
        for name in (*who[1:], *self.choosers.values()):
            if name != "model" and name not in context.companions:
                raise ValueError(f"objective {options.name!r} needs [companions.{name}]")
        self.requires = tuple(Request.parse(text) for text in dict.fromkeys(requests))

    def count(self, batch: Batch) -> Tensor:
        streams = [self.options.preferred]
        if isinstance(self.options.rejected, TextRejected):
            streams.append(self.options.rejected.of)
        live = torch.ones(len(batch), dtype=torch.bool)
        for stream in streams:
            live &= sample_counts(targets_of(batch_layout(batch, stream)).sample_index, len(batch)) > 0
        return live.sum().double()

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B], weight 1; a sample without targets in either answer has weight 0.

        Scalars: accuracy (share of samples whose preferred answer has the greater reward), margin (mean difference of the rewards),
        reward_preferred, reward_rejected (means of beta times the log-probability over the reference's).
        Raises RunFailed where a chooser's view has other targets than the view that is scored; DataError for two rows of a sample.
        """
        options, batch = self.options, context.batch
        own = self._scores("model", views, batch)
        chosen, other = own.preferred, own.rejected
        if options.reference is not None:
            with torch.no_grad():
                reference = self._scores(options.reference, views, batch)
            # In this order equal policies give exactly 0.
            logit = options.beta * ((chosen - other) - (reference.preferred - reference.rejected))
            rewards = (chosen - reference.preferred, other - reference.rejected)
        else:
            logit, rewards = options.beta * (chosen - other), (chosen, other)
        values = F.softplus(-logit) if options.loss == "sigmoid" else F.relu(1 - logit)
        if options.nll:
            norm = own.tokens.clamp(min=1) if options.nll_norm == "tokens" else options.nll_norm
            values = values - options.nll * chosen / norm
        weights = own.live.to(values.dtype)
        good, bad = (options.beta * reward.detach() for reward in rewards)
        return Terms(
            values=values,
            weights=weights,
            sample_index=torch.arange(len(batch), device=values.device),
            scalars={
                name: (value * weights).sum() / weights.sum().clamp(min=1)
                for name, value in {
                    "accuracy": (logit.detach() > 0).to(weights),
                    "margin": logit.detach(),
                    "reward_preferred": good,
                    "reward_rejected": bad,
                }.items()
            },
        )

    def _scores(self, who: str, views: Views, batch: Batch) -> Scores:
        """Sums of log-probabilities of both answers under one model, each read with its clean picture."""
        options, keys, samples = self.options, batch.keys, len(batch)
        name = f"{who}/{options.preferred}"
        view = views[name]
        one_row_a_sample(view, keys, options.preferred)
        if isinstance(options.rejected, TextRejected):
            scores, targets = target_log_probabilities(view)
            rejected_view = views[f"{who}/{options.rejected.of}"]
            one_row_a_sample(rejected_view, keys, options.rejected.of)
            rejected_scores, rejected_targets = target_log_probabilities(rejected_view)
        else:
            chooser = f"{self.choosers[who]}/{options.rejected.of}"
            vocabulary, layout = factors_of(view)
            ids, places = argmax_tokens(views[chooser], size=vocabulary.weight.shape[0])
            match(targets_of(layout), places, keys, what="targets", names=(name, chooser))
            both, targets = target_log_probabilities(view, chosen=ids[:, None])
            scores, rejected_scores, rejected_targets = both[:, 0], both[:, 1], targets
        tokens = sample_counts(targets.sample_index, samples)
        return Scores(
            preferred=sample_sums(scores, targets.sample_index, samples),
            rejected=sample_sums(rejected_scores, rejected_targets.sample_index, samples),
            tokens=tokens,
            live=(tokens > 0) & (sample_counts(rejected_targets.sample_index, samples) > 0),
        )
