"""Grouping objective: each sentence of a picture against the patches that it picks out softly. Source: dreamlip.

B pictures, P patches, M sentences of a picture at most, n sentences of the update, E embedding width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.layers import normalise
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.objectives.contrastive_targets import place_in_sample, where
from vlm.types import Context, Outputs, Request, Terms, Views
from vlm.types.terms import Scope

Norm = Literal["minmax", "softmax"]
MAX_SCALE = 100.0
FLAT = 1e-6
"""Similarities of one sentence closer than this are equal: nothing tells one patch from another."""


class GroupingOptions(ObjectiveOptions):
    """Patches are weighed by their similarity to a sentence; their sum must find its sentence among all of the update."""

    kind: Literal["grouping"] = "grouping"
    name: str = "grouping"
    rows: str = Field("image", description="stream of pictures, one a sample")
    columns: str = Field("text", description="stream of sentences, any number a sample")
    norm: Norm = Field("minmax", description="similarities to weights: minmax: the weakest patch has 0; softmax: none has")
    delta: float = Field(0.0, lt=1, description="weights below this become 0; negative: below 1 over the number of patches")
    temperature: Literal["model", "own"] | float = Field(
        "own", description="the model's scale, one of the objective's own within 1..100, or a fixed temperature"
    )

    def build(self, context: BuildContext) -> GroupingObjective:
        if not isinstance(self.temperature, str) and self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature:g}, expected a number above 0")
        return GroupingObjective(self)


class GroupingObjective(Objective):
    """One value a sentence: the mean of its loss against all groups and its group's against all sentences."""

    scope: Scope = "batch"

    def __init__(self, options: GroupingOptions) -> None:
        super().__init__()
        self.options = options
        self.rows, self.columns = f"model/{options.rows}", f"model/{options.columns}"
        self.requires = (Request.parse(f"{self.rows}.tokens"), Request.parse(f"{self.columns}.embedding"))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07))) if options.temperature == "own" else None

    def scale(self, view: Outputs) -> Tensor:
        """log of the similarity scale."""
        if self.log_scale is not None:
            return self.log_scale.clamp(0.0, math.log(MAX_SCALE))
        if self.options.temperature == "model":
            if view.log_scale is None:
                raise ValueError('temperature = "model", but the model has no similarity scale; use "own" or a number')
            return view.log_scale
        return torch.tensor(-math.log(float(self.options.temperature)))

    def prepare(self, views: Views, context: Context) -> Views:
        """`model/ROWS`: embedding [n, E], the group of each sentence; `model/COLUMNS`: its own embedding. Both in the order of
        sentences, so that patch tokens never leave their micro-batch."""
        seen, said = views[self.rows], views[self.columns]
        assert seen.tokens is not None
        assert seen.token_mask is not None
        assert said.embedding is not None
        if len(seen.sample_index.unique()) != len(seen.sample_index):
            raise ValueError(f"stream {self.options.rows!r} must have one row a sample")
        token_mask = seen.token_mask & seen.mask[:, None]
        shown = seen.sample_index[token_mask.any(1)]
        live = said.mask & torch.isin(said.sample_index, shown)
        exact = torch.promote_types(seen.tokens.dtype, said.embedding.dtype) == torch.float64
        groups = said.embedding.new_zeros(said.embedding.shape, dtype=torch.float64 if exact else torch.float32)
        if bool(live.any()):
            row = where(seen.sample_index)[said.sample_index[live]]
            place = place_in_sample(said.sample_index)[live]
            text = groups.new_zeros(len(seen.sample_index), int(place.max()) + 1, groups.shape[1])
            text = text.index_put((row, place), said.embedding[live].to(groups))
            made = group(seen.tokens.to(groups.dtype), token_mask, text, norm=self.options.norm, delta=self.options.delta)
            groups = groups.index_put((live.nonzero().flatten(),), made[row, place])
        own = replace(said, embedding=groups, mask=live, tokens=None, token_mask=None)
        return Views({self.rows: own, self.columns: replace(said, mask=live, tokens=None, token_mask=None)})

    def forward(self, views: Views, context: Context) -> Terms:
        """values [n] >= 0; a sentence without a picture is left out."""
        seen, said = views[self.rows], views[self.columns]
        assert seen.embedding is not None
        assert said.embedding is not None
        live = (seen.mask & said.mask).nonzero().flatten()
        u, t = normalise(seen.embedding[live]), normalise(said.embedding[live])
        log_scale = self.scale(seen).to(u).reshape(())
        by_group, by_sentence = ops.contrastive_softmax(u, t, log_scale)
        values = 0.5 * (by_group + by_sentence)
        index = said.sample_index[live]
        return Terms(values=values, weights=torch.ones_like(values).detach(), sample_index=index,
                     scalars={"scale": log_scale.detach().exp()})


def patch_weights(similarity: Tensor, mask: Tensor, *, norm: Norm = "minmax", delta: float = 0.0) -> Tensor:
    """Similarities [..., P] to weights of a sum of 1 over the patches that `mask` [..., P] keeps; all 0 where it keeps none.

    Below `delta` (negative: 1 over the patches kept) a weight is 0. Where nothing is left, or with minmax all are equal
    (one patch), the weights are uniform.
    """
    kept = mask.sum(-1, keepdim=True).clamp(min=1).to(similarity)
    if norm == "softmax":
        # A row without any patch would be a softmax of nothing: its gradient must stay a number too.
        some = mask | ~mask.any(-1, keepdim=True)
        weights = similarity.masked_fill(~some, float("-inf")).softmax(-1).masked_fill(~mask, 0)
    else:
        low = similarity.masked_fill(~mask, float("inf")).amin(-1, keepdim=True)
        high = similarity.masked_fill(~mask, float("-inf")).amax(-1, keepdim=True)
        wide = high - low > FLAT
        low, width = torch.where(wide, low, 0), torch.where(wide, high - low, 1)
        weights = torch.where(wide & mask, (similarity - low) / width, 0)
    least = 1 / kept if delta < 0 else torch.full_like(kept, delta)
    weights = torch.where(weights < least, 0, weights)
    total = weights.sum(-1, keepdim=True)
    uniform = mask.to(similarity) / kept
    return torch.where(total > FLAT, weights / torch.where(total > FLAT, total, 1), uniform)


def group(tokens: Tensor, token_mask: Tensor, text: Tensor, *, norm: Norm = "minmax", delta: float = 0.0) -> Tensor:
    """Patches [B, P, E] with their mask [B, P] and sentences [B, M, E] -> the group of each sentence [B, M, E], unit length.

    Patches and sentences are brought to unit length first. The gradient reaches patches through the weights and through the
    sum. A masked patch may hold anything, NaN too. Without any patch the group is 0.
    """
    v, t = _unit(torch.where(token_mask[..., None], tokens, 0)), _unit(text)
    mask = token_mask[:, None].expand(-1, t.shape[1], -1)
    weights = patch_weights(t @ v.transpose(1, 2), mask, norm=norm, delta=delta)
    return _unit(weights @ v)


def _unit(x: Tensor) -> Tensor:
    """Unit length over the last axis, in float32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
