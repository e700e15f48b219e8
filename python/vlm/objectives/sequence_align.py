"""The similarity of two interleaved sequences, from hidden states, must be that of their alignment by frozen models.

n rows, K slices, P pairs, B samples of the update, C width, D width of the projections. Source: sugar.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.layers import normalise
from vlm.models import Model
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.slices import embedded, slices_of
from vlm.objectives.vocabulary import bare, one_row_a_sample
from vlm.ops import log_alignment_kernel, sequence_alignment
from vlm.types import Context, Outputs, Request, Terms, Views

Kernel = Literal["gak", "soft-dtw", "dtw"]


def sequence_similarity(
    cosine: Tensor,
    lengths: Tensor,
    first: Tensor,
    second: Tensor,
    *,
    kernel: Kernel = "gak",
    sigma: float = 0.1,
    gamma: float = 0.1,
    positive_definite: bool = True,
    scale_by_length: bool = True,
) -> Tensor:
    """cosine [B, K, B, K] of slices, lengths [B], pairs first, second [P] -> similarities [P]; 1 for equal sequences.

    With A the logarithm of an alignment's strength, exp((A_xy - (A_xx + A_yy) / 2) / max(n, m)), or without that division unless
    `scale_by_length`. gak: the global alignment kernel of k = exp((cosine - 1) / sigma), or of k / (2 - k) where it is to be
    `positive_definite`. soft-dtw, dtw: A is -1 / sigma times the alignment cost of 1 - cosine, by the soft minimum of `gamma`.
    """
    own = torch.arange(len(lengths), device=cosine.device)
    rows, columns = torch.cat([first, own]), torch.cat([second, own])
    pairs = cosine[rows, :, columns]
    if kernel == "gak":
        log_k = ((pairs - 1) / sigma).clamp(max=0)
        if positive_definite:
            log_k = log_k - (2 - log_k.exp()).log()
        strength = log_alignment_kernel(log_k, lengths[rows], lengths[columns])
    else:
        cost = sequence_alignment(1 - pairs, lengths[rows], lengths[columns], gamma=gamma if kernel == "soft-dtw" else 0.0)
        strength = -cost / sigma
    both, alone = strength[: len(first)], strength[len(first) :]
    value = both - 0.5 * (alone[first] + alone[second])
    if scale_by_length:
        value = value / torch.maximum(lengths[first], lengths[second])
    return value.exp()


def width_of(model: Model) -> int:
    """Width of a model's hidden states, its own or that of the language model inside. Raises ValueError for a model without."""
    width = getattr(getattr(model, "language", model).options, "width", None)
    if not isinstance(width, int):
        raise ValueError(f"a {model.kind} model does not say how wide its hidden states are")
    return width


class SequenceAlignOptions(ObjectiveOptions):
    """Pairs of samples of the update. A sample is the row of slices that `vlm.objectives.slices` finds in it."""

    kind: Literal["sequence-align"] = "sequence-align"
    name: str = "sequence-align"
    stream: str = Field("text", description="stream of token ids, one row a sample; TEXT@PICTURES names its picture stream")
    layer: int = Field(description="layer whose hidden states are read: the mean over a picture, the last position of a text", ge=0)
    texts: str = Field("slices", description="stream of the texts between pictures, one row each, that the teachers embed")
    teacher: str = Field("teacher", description="companion that embeds pictures and texts in one space")
    image_teacher: str | None = Field(None, description="companion that compares pictures; default: the teacher")
    text_teacher: str | None = Field(None, description="companion that compares texts; default: the teacher")
    kernel: Kernel = Field("gak", description="global alignment kernel, soft-DTW or DTW")
    match: Literal["mse"] = Field("mse", description="distance of predicted and target similarities")
    sigma: float = Field(0.1, gt=0, description="temperature of the kernel of slices, exp((cosine - 1) / sigma)")
    gamma: float = Field(0.1, gt=0, description="softness of soft-dtw")
    calibrate: bool = Field(True, description="bring the distances of the three kinds of pairs to one mean, since teachers differ")
    scale_by_length: bool = Field(True, description="divide logarithms by the greater length, so that long sequences stay comparable")
    dim: int = Field(128, ge=1, description="width of the projections")

    @model_validator(mode="after")
    def _softness(self) -> SequenceAlignOptions:
        self.read_only_where(self.kernel == "soft-dtw", 'kernel = "soft-dtw"', "gamma")
        return self

    def build(self, context: BuildContext) -> Objective:
        return SequenceAlign(self, context)


class SequenceAlign(Objective):
    """One value a sample: the mean over its pairs of (predicted - target similarity)^2."""

    scope = "batch"

    def __init__(self, options: SequenceAlignOptions, context: BuildContext) -> None:
        super().__init__()
        self.options = options
        self.image, self.text = options.image_teacher or options.teacher, options.text_teacher or options.teacher
        for name in (options.teacher, self.image, self.text):
            if name not in context.companions:
                raise ValueError(f"objective {options.name!r} needs [companions.{name}]")
        self.pictures = options.stream.partition("@")[2] or "image"
        self.own = f"model/{options.stream}"
        asked = [f"{self.own}.hidden:{options.layer}"]
        asked += [f"{who}/{self.pictures}.embedding" for who in (options.teacher, self.image)]
        asked += [f"{who}/{options.texts}.embedding" for who in (options.teacher, self.text)]
        self.requires = tuple(Request.parse(name) for name in dict.fromkeys(asked))
        self.reads = (bare(options.stream), self.pictures, options.texts)
        width = width_of(context.model)
        depth = getattr(getattr(context.model, "language", context.model).options, "depth", None)
        if isinstance(depth, int) and options.layer > depth:
            raise ValueError(f"objective {options.name!r}: layer is {options.layer}, the model has {depth}")
        self.project = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Linear(width, options.dim), nn.GELU(), nn.Linear(options.dim, options.dim))
                for name in ("visual", "text")
            }
        )

    def prepare(self, views: Views, context: Context) -> Views:
        """Slice vectors: `model/STREAM` tokens [n, K, C + 1], the last channel 1 for a picture; and of each teacher [n, K, E]."""
        options, view, keys = self.options, views[self.own], context.batch.keys
        one_row_a_sample(view, keys, options.stream)
        layout = view.layout_of(options.layer)
        assert layout is not None
        slices = slices_of(layout)
        hidden = view.hidden[options.layer]
        # Padding may hold anything, and 0 times NaN is NaN.
        read = slices.read.to(hidden.dtype) @ torch.where(layout.mask[..., None], hidden, 0)
        tokens = torch.cat([read, slices.visual[..., None].to(read.dtype)], dim=2)
        out = Views({self.own: Outputs(view.sample_index, slices.mask.any(1), tokens=tokens, token_mask=slices.mask)})
        for who in dict.fromkeys((options.teacher, self.image, self.text)):
            seen = views[f"{who}/{self.pictures}"] if who in (options.teacher, self.image) else None
            told = views[f"{who}/{options.texts}"] if who in (options.teacher, self.text) else None
            said = embedded(slices, view.sample_index, seen, told, keys, f"{who}/{options.texts}")
            out[f"{who}/{options.stream}"] = Outputs(view.sample_index, slices.mask.any(1), tokens=said, token_mask=slices.mask)
        return out

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B]; a sample without slices, or the only one with any, has weight 0. Scalars `predicted` and `target`: mean
        similarities of the pairs."""
        view = views[self.own]
        assert view.tokens is not None
        assert view.token_mask is not None
        live = view.token_mask.any(1)
        mask = view.token_mask[live]
        with torch.no_grad():
            target = self._similarities(self._taught(views, live, mask, view.tokens[live][..., -1] > 0), mask)
        vectors = self._projected(view.tokens[live])
        predicted = self._similarities(self._cosines(vectors, mask), mask)
        size = len(mask)
        first, second = torch.triu_indices(size, size, 1, device=mask.device)
        error = (predicted - target).square()
        values = error.new_zeros(size).index_add(0, first, error).index_add(0, second, error) / max(1, size - 1)
        weights = torch.ones_like(values.detach())
        scalars = {} if size < 2 else {"predicted": predicted.detach().mean(), "target": target.mean()}
        return Terms(values, weights, view.sample_index[live], scalars=scalars)

    def _projected(self, tokens: Tensor) -> Tensor:
        x, visual = tokens[..., :-1], tokens[..., -1:] > 0
        weight = next(self.project["text"].parameters())
        x = x.to(weight.dtype)
        return torch.where(visual, self.project["visual"](x), self.project["text"](x))

    @staticmethod
    def _cosines(vectors: Tensor, mask: Tensor) -> Tensor:
        """vectors [B, K, D] -> [B, K, B, K]"""
        unit = normalise(torch.where(mask[..., None], vectors, 1.0)).flatten(0, 1)
        return (unit @ unit.T).view(*mask.shape, *mask.shape)

    def _taught(self, views: Views, live: Tensor, mask: Tensor, visual: Tensor) -> Tensor:
        """Cosines of the teachers: two pictures by one, two texts by another, a picture and a text by the third."""
        found = {}
        for who in dict.fromkeys((self.options.teacher, self.image, self.text)):
            tokens = views[f"{who}/{self.options.stream}"].tokens
            assert tokens is not None
            found[who] = self._cosines(tokens[live].float(), mask)
        left, right = visual[:, :, None, None], visual[None, None]
        kinds = [(self.image, left & right), (self.text, ~left & ~right), (self.options.teacher, left != right)]
        used = mask[:, :, None, None] & mask[None, None]
        used = used & ~torch.eye(mask.numel(), dtype=torch.bool, device=mask.device).view(used.shape)
        distance = torch.zeros_like(found[self.options.teacher])
        for who, block in kinds:
            distance = torch.where(block, 1 - found[who], distance)
        if self.options.calibrate:
            overall = distance[used].mean() if used.any() else distance.new_ones(())
            for _, block in kinds:
                some = used & block
                if some.any():
                    mean = distance[some].mean()
                    distance = torch.where(block & (mean > 0), distance * (overall / mean.clamp(min=1e-12)), distance)
        return 1 - distance

    def _similarities(self, cosine: Tensor, mask: Tensor) -> Tensor:
        size, options = len(mask), self.options
        first, second = torch.triu_indices(size, size, 1, device=mask.device)
        return sequence_similarity(
            cosine, mask.sum(1), first, second, kernel=options.kernel, sigma=options.sigma, gamma=options.gamma,
            scale_by_length=options.scale_by_length,
        )  # fmt: skip
