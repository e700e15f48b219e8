"""Cross-entropy over the vocabulary. n rows, T positions, V ids, R supervised targets. Sources: every language model."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Layout, Request, Terms, TokenIds, Views, Vocabulary
from vlm.types.layout import IGNORE

_CHUNK = 2**24
"""Logits held at once, in elements (64 MiB of float32)."""


class TokenCrossEntropyOptions(ObjectiveOptions):
    """Next-token prediction; each supervised token is one term of weight 1."""

    kind: Literal["token-ce"] = "token-ce"
    name: str = "token-ce"
    stream: str = Field("text", description="stream of token ids")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log normaliser")

    def build(self, context: BuildContext) -> TokenCrossEntropy:
        return TokenCrossEntropy(self)


def next_token_targets(layout: Layout) -> Tensor:
    """[n, T] target at each position: the label of the next position of the same document, else IGNORE."""
    target = torch.full_like(layout.label, IGNORE)
    same = layout.segment[:, 1:] == layout.segment[:, :-1]
    usable = layout.mask[:, 1:] & layout.mask[:, :-1] & same
    target[:, :-1] = torch.where(usable, layout.label[:, 1:], IGNORE)
    return target


class TokenCrossEntropy(Objective):
    """-log p(next token), in chunks of rows so that logits [n T, V] never exist at once."""

    def __init__(self, options: TokenCrossEntropyOptions) -> None:
        super().__init__()
        self.options = options
        self.requires = (Request.parse(f"model/{options.stream}.vocabulary"),)

    def count(self, batch: Batch) -> Tensor:
        stream = batch[self.options.stream]
        assert isinstance(stream, TokenIds)
        layout = Layout.of_tokens(
            stream.values, stream.mask, stream.sample_index, segment=stream.segment, supervised=stream.supervised, target=stream.target
        )
        return (next_token_targets(layout) != IGNORE).sum().double()

    def forward(self, views: Views, context: Context) -> Terms:
        """values [R]: one a supervised target. Scalar `nats` is the plain cross-entropy without smoothing or z-loss."""
        view = views[f"model/{self.options.stream}"]
        assert view.layout is not None
        assert view.vocabulary is not None
        targets = next_token_targets(view.layout)
        chosen = targets != IGNORE
        hidden, ids = view.vocabulary.hidden[chosen], targets[chosen]
        vocabulary = view.vocabulary
        rows = max(1, _CHUNK // vocabulary.weight.shape[0])
        parts = [
            checkpoint(self._chunk, h, i, vocabulary.weight, vocabulary, use_reentrant=False)
            for h, i in zip(hidden.split(rows), ids.split(rows))
        ]
        values = torch.cat([part[0] for part in parts]) if parts else hidden.new_zeros(0, dtype=torch.float32)
        nats = torch.cat([part[1] for part in parts]).detach() if parts else values
        return Terms(
            values=values,
            weights=torch.ones_like(values.detach()),
            sample_index=view.layout.sample_index[:, None].expand_as(targets)[chosen],
            scalars={"nats": nats.mean() if len(nats) else 0.0},
        )

    def _chunk(self, hidden: Tensor, ids: Tensor, weight: Tensor, vocabulary: Vocabulary) -> tuple[Tensor, Tensor]:
        logits = Vocabulary(hidden, weight, vocabulary.bias, vocabulary.softcap).logits().float()
        nats = F.cross_entropy(logits, ids, reduction="none")
        values = nats
        if self.options.smoothing:
            values = F.cross_entropy(logits, ids, reduction="none", label_smoothing=self.options.smoothing)
        if self.options.z_loss:
            values = values + self.options.z_loss * logits.logsumexp(-1).square()
        return values, nats
