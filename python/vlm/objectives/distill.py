"""Distillation from a companion: features or vocabulary logits of one sample, or rows of similarities over the update.

B samples, E student width, F teacher width, R positions. Sources: llava-kd (logits, relation), ctp (similarity rows), salt, hovle
(features).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.layers import normalise
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.relation import feature_relation, logit_relation
from vlm.objectives.token_ce_weights import Reduction, reduction_of, target_weights
from vlm.objectives.vocabulary import (
    Direction,
    Positions,
    Unit,
    bare,
    batch_layout,
    exact,
    factors_of,
    match,
    position_divergences,
    same,
    sample_counts,
    sample_means,
    targets_of,
    valid_of,
    visual_of,
)
from vlm.types import Batch, Context, Layout, Outputs, Request, Terms, Views

_SAME_POSITIONS = "both must read the same rows, expand a picture to the same positions and drop the same ones"


class DistillOptions(ObjectiveOptions):
    """What of the student approaches the teacher's.

    `feature`: embeddings. `similarity`: rows of similarities between two streams. `logits`: distributions over the vocabulary, position
    by position. `relation`: products between the visual positions of a picture.
    """

    kind: Literal["distill"] = "distill"
    name: str = "distill"
    target: Literal["feature", "similarity", "logits", "relation"] = "feature"
    teacher: str = Field("teacher", description="companion that teaches")
    streams: tuple[str, ...] = Field(("image", "text"), description="feature, similarity: streams whose embeddings are matched")
    distance: Literal["cosine", "mse"] = Field("cosine", description="feature: 1 - cosine, or squared error of unit vectors")
    temperature: float | None = Field(
        None, gt=0, description="similarity, logits: temperature of both softmaxes; default 0.07 and 1"
    )
    stream: str = Field("text", description="logits, relation: stream of token ids; TEXT@PICTURES names its picture stream")
    at: Literal["answers", "visual", "all"] = Field(
        "answers",
        description="logits: where an answer is predicted; at the visual positions themselves; or at every valid position",
    )
    unit: Unit = Field("causal", description="logits at answers: predicted by the position before, or by the masked position itself")
    direction: Direction = Field("forward", description="logits: the divergence; forward is KL(teacher || student)")
    mix: float | None = Field(
        None, gt=0, lt=1, description="logits: mixture of symmetric and js (default 0.9) and of skew (default 0.1)"
    )
    teacher_top: int = Field(
        0, ge=0, description="logits: only so many ids of a position have a probability of the teacher, its likeliest; 0: all"
    )
    per: Literal["token", "sample"] = Field("sample", description="logits: one term a position, or the mean over a sample's positions")
    weights: str | None = Field(
        None,
        description="logits at answers: stream of one weight a token of `stream`, or one a sample; a token of weight 0 is left out. "
        "Weights of tokens count within a sample, those of samples between them; none: 1",
    )
    gradients: Literal["forward", "recompute"] = Field(
        "forward", description="logits: made with the loss, a product less; or in the backward pass, nothing kept between"
    )
    leave_last: bool = Field(
        True, description="visual positions: leave out the last one of a picture, whose logits predict text"
    )
    source: str = Field("logits", pattern=r"^(logits|hidden:\d+)$", description="relation: of raw logits, or of a layer's hidden states")
    teacher_source: str | None = Field(
        None, pattern=r"^(logits|hidden:\d+)$", description="relation: the same of the teacher; default: as the student"
    )
    metric: Literal["cosine"] = Field("cosine", description="relation: 1 - cosine of the two matrices")

    @model_validator(mode="after")
    def _combination(self) -> DistillOptions:
        if self.weights is not None and not (self.target == "logits" and self.at == "answers"):
            raise ValueError('weights is of target = "logits" at answers')
        if self.teacher_top and not (self.target == "logits" and self.direction == "forward"):
            raise ValueError('teacher_top is of target = "logits" with direction = "forward": the others need all ids of the teacher')
        logits, relation = self.target == "logits", self.target == "relation"
        mixed = logits and self.direction in ("symmetric", "js", "skew")
        self.read_only_where(self.target in ("feature", "similarity"), 'target = "feature" or "similarity"', "streams")
        self.read_only_where(self.target == "feature", 'target = "feature"', "distance")
        self.read_only_where(logits or self.target == "similarity", 'target = "similarity" or "logits"', "temperature")
        self.read_only_where(logits or relation, 'target = "logits" or "relation"', "stream")
        self.read_only_where(logits, 'target = "logits"', "at", "direction", "per", "gradients")
        self.read_only_where(logits and self.at == "answers", 'target = "logits" and at = "answers"', "unit")
        self.read_only_where(mixed, 'target = "logits" and direction = "symmetric", "js" or "skew"', "mix")
        self.read_only_where(relation or (logits and self.at == "visual"), 'at = "visual" or target = "relation"', "leave_last")
        self.read_only_where(relation, 'target = "relation"', "source", "teacher_source")
        return self

    def build(self, context: BuildContext) -> Objective:
        kinds = {"similarity": SimilarityDistill, "logits": LogitDistill, "relation": RelationDistill}
        return FeatureDistill(self, context) if self.target == "feature" else kinds[self.target](self, context)


def _requests(options: DistillOptions) -> tuple[Request, ...]:
    return tuple(
        Request.parse(f"{who}/{stream}.embedding") for who in ("model", options.teacher) for stream in options.streams
    )


class FeatureDistill(Objective):
    """One value a sample, the mean over streams. Widths that differ are bridged by a learned linear map."""

    def __init__(self, options: DistillOptions, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        self.requires = _requests(options)
        if options.teacher not in context.companions:
            raise ValueError(f"objective {options.name!r} needs [companions.{options.teacher}]")
        student = int(getattr(context.model.options, "embed_dim"))  # noqa: B009 - families without it are refused by `offers`
        teacher = int(getattr(context.companions[options.teacher].options, "embed_dim"))  # noqa: B009
        self.bridges = nn.ModuleDict(
            {} if student == teacher else {name: nn.Linear(student, teacher, bias=False) for name in options.streams}
        )

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B]; a sample masked in any stream has weight 0."""
        total: Tensor | None = None
        weights: Tensor | None = None
        for name in self.options.streams:
            student, teacher = views[f"model/{name}"], views[f"{self.options.teacher}/{name}"]
            assert student.embedding is not None
            assert teacher.embedding is not None
            x = student.embedding
            if name in self.bridges:
                bridge = self.bridges[name]
                assert isinstance(bridge, nn.Linear)
                x = bridge(x.to(bridge.weight.dtype))
            cosine = (normalise(x) * normalise(teacher.embedding)).sum(-1)
            value = 1 - cosine if self.options.distance == "cosine" else 2 - 2 * cosine
            live = (student.mask & teacher.mask).float()
            total = value if total is None else total + value
            weights = live if weights is None else weights * live
            index = student.sample_index
        assert total is not None
        assert weights is not None
        return Terms(total / len(self.options.streams), weights, index)

    def count(self, batch: Batch) -> Tensor:
        live = torch.ones(len(batch), dtype=torch.bool)
        for name in self.options.streams:
            mask = batch[name].mask
            live &= mask if mask.dim() == 1 else mask.any(1)
        return live.sum().double()


class SimilarityDistill(Objective):
    """KL(teacher row || student row) of softmaxed similarities between the two streams, both directions."""

    scope = "batch"

    def __init__(self, options: DistillOptions, context: BuildContext) -> None:
        super().__init__()
        if len(options.streams) != 2:
            raise ValueError(f"objective {options.name!r}: similarity rows need two streams, got {list(options.streams)}")
        self.options = options
        self.requires = _requests(options)

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B], the mean of the row's and the column's divergence."""
        logits = []
        first, second = self.options.streams
        live = views[f"model/{first}"].mask & views[f"model/{second}"].mask
        for who in ("model", self.options.teacher):
            left, right = views[f"{who}/{first}"].embedding, views[f"{who}/{second}"].embedding
            assert left is not None
            assert right is not None
            logits.append(normalise(left[live]) @ normalise(right[live]).T / (self.options.temperature or 0.07))
        student, teacher = logits
        values = student.new_zeros(student.shape[0])
        for s, t in ((student, teacher), (student.T, teacher.T)):
            values = values + 0.5 * F.kl_div(s.log_softmax(-1), t.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        return Terms(values, torch.ones_like(values.detach()), views[f"model/{first}"].sample_index[live])


def _visual_rows(batch: Batch, stream: str) -> Tensor:
    """[n] int64: how many pictures each row of a text stream is read with."""
    text, pictures = batch[bare(stream)], stream.partition("@")[2] or "image"
    if pictures not in batch:
        return torch.zeros_like(text.sample_index)
    rows = batch[pictures]
    live = rows.mask if rows.mask.dim() == 1 else rows.mask.any(1)
    counts = sample_counts(rows.sample_index[live], len(batch))[text.sample_index]
    return counts * text.mask.flatten(1).any(1)


class _PositionDistill(Objective):
    """Positions of one stream, matched between student and teacher."""

    def __init__(self, options: DistillOptions, context: BuildContext, fields: tuple[str, ...]) -> None:
        super().__init__()
        if options.teacher not in context.companions:
            raise ValueError(f"objective {options.name!r} needs [companions.{options.teacher}]")
        self.options = options
        self.names = (f"model/{options.stream}", f"{options.teacher}/{options.stream}")
        self.requires = tuple(Request.parse(f"{name}.{field}") for name, field in zip(self.names, fields))

    def _matched(self, at: str, layouts: tuple[Layout, Layout], batch: Batch) -> tuple[Positions, Positions]:
        """The positions of both, the k-th of one beside the k-th of the other. Raises RunFailed where they do not agree."""
        options, (student, teacher) = self.options, layouts
        if at == "answers":
            own, other, what = targets_of(student, options.unit), targets_of(teacher, options.unit), "targets"
        elif at == "visual":
            own, other = (visual_of(layout, options.leave_last) for layout in layouts)
            what = "visual positions"
        else:
            own, other, what = valid_of(student), valid_of(teacher), "positions"
        match(own, other, batch.keys, what=what, names=self.names)
        if at == "answers":
            labels = own.told(student.label), other.told(teacher.label)
            same(*labels, own, batch.keys, f"{self.names[0]} and {self.names[1]} have different targets", _SAME_POSITIONS)
        else:
            for name in ("picture", "kept"):
                places = own.of(getattr(student, name)), other.of(getattr(teacher, name))
                same(*places, own, batch.keys, f"{self.names[0]} and {self.names[1]} hold different {what}", _SAME_POSITIONS)
        if at == "visual":
            self._expanded(own, batch)
        return own, other

    def _expanded(self, visual: Positions, batch: Batch) -> None:
        """Raises ValueError where a sample has a picture but no position of it in its text."""
        rows = batch[bare(self.options.stream)].sample_index
        expected = torch.zeros(len(batch), dtype=torch.bool, device=rows.device)
        expected[rows[_visual_rows(batch, self.options.stream) > 0]] = True
        found = sample_counts(visual.sample_index, len(batch)) > 0
        for sample in (expected & ~found).nonzero().flatten().tolist()[:1]:
            raise ValueError(
                f"objective {self.options.name!r}: {batch.keys[sample]} has a picture but no visual positions in "
                f"{self.options.stream!r}; expected a model that puts pictures among the tokens"
            )


class LogitDistill(_PositionDistill):
    """A divergence of the vocabulary's distributions at matched positions (llava-kd, MDist)."""

    def __init__(self, options: DistillOptions, context: BuildContext) -> None:
        super().__init__(options, context, ("vocabulary", "vocabulary"))
        self.expands = context.model.training_positions
        self.reads = () if options.weights is None else (options.weights,)
        if options.per == "token" and options.at == "visual" and self.expands is None:
            raise ValueError(
                f'objective {options.name!r}: per = "token" at visual positions needs a model that says how many a picture takes; '
                'use per = "sample"'
            )

        if options.per == "token" and options.at != "answers" and context.model.tiles_apart:
            raise ValueError(
                f'objective {options.name!r}: per = "token" at {options.at} positions needs a model whose tiles all stand in the row; '
                'use per = "sample"'
            )

    def count(self, batch: Batch) -> Tensor:
        options, samples = self.options, batch[bare(self.options.stream)].sample_index
        if options.weights is not None:
            layout = batch_layout(batch, options.stream)
            return self._reduced(targets_of(layout, options.unit), layout, batch, torch.float64)[1].weights.sum()
        if options.at == "visual":
            pictures = _visual_rows(batch, options.stream)
            n = self.expands or 1
            each, samples = pictures * max(1, n - int(options.leave_last)), samples[pictures > 0]
        else:
            layout = batch_layout(batch, options.stream)
            chosen = targets_of(layout, options.unit) if options.at == "answers" else valid_of(layout)
            each, samples = torch.tensor(len(chosen)), chosen.sample_index
            if options.at == "all" and self.expands is not None:
                # A placeholder gives way to the positions of its picture.
                each = each + _visual_rows(batch, options.stream).sum() * (self.expands - 1)
        return each.sum().double() if options.per == "token" else torch.tensor(len(samples.unique())).double()

    def forward(self, views: Views, context: Context) -> Terms:
        """sample: values [B], weight 0 for a sample without such a position; token: values [R], one a position."""
        options, batch = self.options, context.batch
        (student, layout), (teacher, other_layout) = (factors_of(views[name]) for name in self.names)
        own, other = self._matched(options.at, (layout, other_layout), batch)
        some, reduction = self._reduced(own, layout, batch, exact(student.hidden[:0]).dtype)
        if some is not None:
            own, other = own[some], other[some]
        # Weighted inside, so that equal samples give every position the same upstream gradient.
        share = None if reduction.group is None else reduction.share
        values = position_divergences(
            (student, own.of(student.hidden)),
            (teacher, other.of(teacher.hidden)),
            direction=options.direction,
            temperature=options.temperature or 1.0,
            mix=options.mix,
            top=options.teacher_top,
            token_weights=share,
            gradients=options.gradients,
        )
        return Terms(reduction.terms(values), reduction.weights, reduction.sample_index)

    def _reduced(self, positions: Positions, layout: Layout, batch: Batch, dtype: torch.dtype) -> tuple[Tensor | None, Reduction]:
        """Which of the positions count, None for all, and how their values become terms."""
        options = self.options
        if options.weights is None:
            return None, reduction_of(options.per, positions, layout, len(batch), None, False, dtype)
        weights = target_weights(batch, options.stream, options.weights, options.unit, positions)
        some, of_samples = weights > 0, batch[options.weights].values.dim() == 1
        return some, reduction_of(options.per, positions[some], layout, len(batch), weights[some], of_samples, dtype)


class RelationDistill(_PositionDistill):
    """1 - cosine of Z Z^T of both models over the visual positions of a picture (llava-kd, RDist)."""

    def __init__(self, options: DistillOptions, context: BuildContext) -> None:
        sources = (options.source, options.teacher_source or options.source)
        if (sources[0] == "logits") != (sources[1] == "logits"):
            raise ValueError(f"objective {options.name!r}: source and teacher_source must both be logits or both hidden states")
        super().__init__(options, context, tuple("vocabulary" if source == "logits" else source for source in sources))
        self.sources = sources

    def count(self, batch: Batch) -> Tensor:
        rows = batch[bare(self.options.stream)].sample_index
        return torch.tensor(float(len(rows[_visual_rows(batch, self.options.stream) > 0].unique())), dtype=torch.float64)

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B], the mean over a sample's pictures; a sample without picture has weight 0."""
        batch = context.batch
        views_of = [views[name] for name in self.names]
        layouts = [self._layout(view, source) for view, source in zip(views_of, self.sources)]
        own, other = self._matched("visual", (layouts[0], layouts[1]), batch)
        picture = own.of(layouts[0].picture)
        starts = torch.ones_like(picture, dtype=torch.bool)
        starts[1:] = (own.row[1:] != own.row[:-1]) | (picture[1:] != picture[:-1])
        bounds = [*starts.nonzero().flatten().tolist(), len(picture)]
        index = own.sample_index[starts]
        zero = torch.zeros((), dtype=torch.float32, device=picture.device)
        values = [self._value(views_of, own, other, slice(a, b)) for a, b in pairwise(bounds)]
        means, weights = sample_means(torch.stack(values) if values else zero.new_zeros(0), index, len(batch))
        return Terms(means, weights, torch.arange(len(batch), device=means.device))

    def _layout(self, view: Outputs, source: str) -> Layout:
        layout = view.layout if source == "logits" else view.layout_of(int(source.partition(":")[2]))
        assert layout is not None
        return layout

    def _value(self, views: list[Outputs], own: Positions, other: Positions, part: slice) -> Tensor:
        """The relation of one picture."""
        if self.sources[0] == "logits":
            (student, _), (teacher, _) = (factors_of(view) for view in views)
            return logit_relation((student, own.of(student.hidden)[part]), (teacher, other.of(teacher.hidden)[part]))
        hidden = [view.hidden[int(source.partition(":")[2])] for view, source in zip(views, self.sources)]
        return feature_relation(own.of(hidden[0])[part], other.of(hidden[1]).detach()[part])
