"""Ranking objective: a pair must be more similar than others by a margin, those of the batch or captions made wrong.

n rows of a stream, B samples, E embedding width. Source: structure-clip.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vlm.layers import normalise
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.contrastive_targets import place_in_sample
from vlm.types import Batch, Context, Outputs, Request, Stream, Terms, Views
from vlm.types.terms import Scope


class RankingOptions(ObjectiveOptions):
    """Hinge of cosines. `batch`: against the hardest other rows of the update, in both directions. `made`: a picture and its text against
    the same picture and a text that was made wrong; a model that adds knowledge to texts is asked without it there."""

    kind: Literal["ranking"] = "ranking"
    rows: str = Field("image", description="stream of pictures, one row a sample")
    columns: str = Field("text", description="stream of texts")
    negatives: Literal["batch", "made"] = Field("batch", description="what a pair is ranked above")
    margin: float = Field(0.2, ge=0, le=2, description="by how much the cosine of the pair must be greater")
    mean_warmup: int = Field(
        0, ge=0, description="batch: updates in which a text meets the mean of its hinges over pictures instead of the hardest"
    )
    exclude: Literal["none", "group"] = Field("none", description="batch: group: rows of one group are no negatives of each other")
    made: str = Field("text.negative", description="made: stream of texts made wrong, as scene-graph-swap makes it")

    @model_validator(mode="after")
    def _read(self) -> RankingOptions:
        self.read_only_where(self.negatives == "batch", 'negatives = "batch"', "mean_warmup", "exclude")
        self.read_only_where(self.negatives == "made", 'negatives = "made"', "made")
        return self

    def build(self, context: BuildContext) -> Objective:
        return HingeObjective(self) if self.negatives == "batch" else MadeNegativeObjective(self)


class HingeObjective(Objective):
    """One value a pair: relu(max of others + margin - own) of its row, and the same of its column."""

    scope: Scope = "batch"

    def __init__(self, options: RankingOptions) -> None:
        super().__init__()
        self.options = options
        self.requires = tuple(Request.parse(f"model/{stream}.embedding") for stream in (options.rows, options.columns))
        self.reads = ("group",) if options.exclude == "group" else ()

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B] >= 0; a pair with a masked side is left out, and one without others has the value 0. Scalar `violated`: percent
        of the pairs that some other comes within the margin of."""
        options = self.options
        left, right = views[f"model/{options.rows}"], views[f"model/{options.columns}"]
        if not torch.equal(left.sample_index, right.sample_index):
            raise ValueError(f"streams {options.rows!r} and {options.columns!r} must have one row a sample, in the same order")
        live = (left.mask & right.mask).nonzero().flatten()
        index = left.sample_index[live]
        others = ~torch.eye(len(live), dtype=torch.bool, device=live.device)
        if options.exclude == "group":
            group = context.batch["group"]
            others &= group.values[index][:, None] != group.values[index][None]
        by_row, by_column = hinges(_unit(left, live), _unit(right, live), others, options.margin, mean=context.step < options.mean_warmup)
        values = by_row + by_column
        violated = 100 * (values.detach() > 0).float().mean() if len(live) else torch.zeros(())
        return Terms(values, torch.ones_like(values.detach()), index, scalars={"violated": violated})


def hinges(rows: Tensor, columns: Tensor, others: Tensor, margin: float, *, mean: bool = False) -> tuple[Tensor, Tensor]:
    """Hinges of pairs i of unit rows and columns [n, E], each way [n]. others [n, n]: which column is a negative of a row.

    by_row: row i against the hardest column; by_column: column i against the hardest row, or with `mean` the mean of its hinges.
    Gradient goes to the first of equally hard ones. Without negatives a value is 0.
    """
    similarity = rows @ columns.T
    own = similarity.diagonal()
    if not len(own):
        return own, own
    low = torch.finfo(similarity.dtype).min / 4  # no sum with it overflows
    by_row = torch.relu(similarity.masked_fill(~others, low).max(1).values + margin - own)
    if mean:
        values = torch.relu(similarity + margin - own[None]).masked_fill(~others, 0)
        return by_row, values.sum(0) / others.sum(0).clamp(min=1)
    return by_row, torch.relu(similarity.masked_fill(~others, low).max(0).values + margin - own)


class MadeNegativeObjective(Objective):
    """One value a text made wrong: relu(margin - <v, t> + <v, t made wrong>)."""

    scope: Scope = "sample"

    def __init__(self, options: RankingOptions) -> None:
        super().__init__()
        self.options = options
        self.requires = tuple(Request.parse(f"model/{stream}.embedding") for stream in (options.rows, options.columns, options.made))
        self.reads = (options.rows, options.columns, options.made)

    def count(self, batch: Batch) -> Tensor:
        return torch.tensor(float(len(self._matched(batch)[0])), dtype=torch.float64)

    def forward(self, views: Views, context: Context) -> Terms:
        """values, one a row of `made` whose picture and own text are there. Scalar `accuracy`: percent of them in which the picture is
        nearer to its own text."""
        options = self.options
        at, picture, text = self._matched(context.batch)
        own = _unit(views[f"model/{options.rows}"], picture)
        right, wrong = _unit(views[f"model/{options.columns}"], text, plain=True), _unit(views[f"model/{options.made}"], at, plain=True)
        gap = (own * right).sum(1) - (own * wrong).sum(1)
        values = torch.relu(options.margin - gap)
        accuracy = 100 * (gap.detach() > 0).float().mean() if len(at) else torch.zeros(())
        index = context.batch[options.made].sample_index[at]
        return Terms(values, torch.ones_like(values.detach()), index, scalars={"accuracy": accuracy})

    def _matched(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of `made`, and of each the row of its picture and of the text that it was made from."""
        options = self.options
        pictures, texts, made = batch[options.rows], batch[options.columns], batch[options.made]
        if len(pictures.sample_index.unique()) != len(pictures):
            raise ValueError(f"stream {options.rows!r} must have one row a sample")
        picture = _places(_names(pictures, len(batch), numbered=False), _names(made, len(batch), numbered=False), _live(pictures))
        text = _places(_names(texts, len(batch)), _names(made, len(batch)), _live(texts))
        at = (_live(made) & (picture >= 0) & (text >= 0)).nonzero().flatten()
        return at, picture[at], text[at]


def _unit(view: Outputs, rows: Tensor, *, plain: bool = False) -> Tensor:
    """The chosen embeddings with length 1; plain: without what knowledge adds to them."""
    embedding = view.statistics.get("plain", view.embedding) if plain else view.embedding
    assert embedding is not None
    return normalise(embedding[rows])


def _live(stream: Stream) -> Tensor:
    return stream.mask if stream.mask.dim() == 1 else stream.mask.flatten(1).any(1)


def _names(stream: Stream, samples: int, *, numbered: bool = True) -> Tensor:
    """One number a row: equal for the same sample and slot in two streams."""
    if not numbered:
        return stream.sample_index
    slot = place_in_sample(stream.sample_index) if stream.slot is None else stream.slot
    return slot * samples + stream.sample_index


def _places(known: Tensor, wanted: Tensor, live: Tensor) -> Tensor:
    """Where each wanted name stands among the known ones that are live; -1 where it does not."""
    same = (wanted[:, None] == known[None]) & live[None]
    if not same.shape[1]:
        return torch.full_like(wanted, -1)
    return torch.where(same.any(1), same.to(torch.int32).argmax(1), -1)
