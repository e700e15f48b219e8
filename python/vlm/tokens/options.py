"""The `[tokens]` table: which positions a model drops between its layers."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.tokens.reducer import TokenReducer
from vlm.types import Layout


class AttentionFromRowsOptions(Options):
    """The attention that chosen query rows pay to each position, with the weights of the layer to come."""

    kind: Literal["attention-from-rows"] = "attention-from-rows"
    rows: Literal["last-instruction"] = Field(
        "last-instruction", description="the last position of text before each answer; several turns: their mean"
    )
    norm: Literal["next-layer"] = Field("next-layer", description="whose norm, queries, keys and rotary positions are used")


class TopKOptions(Options):
    """The best of each picture; equal scores go to the lower position."""

    kind: Literal["top-k"] = "top-k"


class GatherOptions(Options):
    """The sequence is cut; what stays keeps its order."""

    kind: Literal["gather"] = "gather"
    positions: Literal["renumber", "keep"] = Field("renumber", description="renumber: counted from 0 again; keep: as before the drop")


class StagesOptions(Options):
    """After each of the layers a share of a picture's original positions is kept, floored."""

    kind: Literal["stages"] = "stages"
    layers: list[int] = Field(min_length=1, description="after these layers, counted from 1, strictly rising")
    ratios: list[float] = Field(min_length=1, description="shares of the original count, never rising")

    @model_validator(mode="after")
    def _in_order(self) -> StagesOptions:
        if len(self.layers) != len(self.ratios):
            raise ValueError(f"{len(self.layers)} layers and {len(self.ratios)} ratios: expected one ratio a layer")
        if self.layers[0] < 1 or any(b <= a for a, b in zip(self.layers, self.layers[1:])):
            raise ValueError(f"layers are {self.layers}, expected 1 or more, strictly rising")
        if not all(0 <= ratio <= 1 for ratio in self.ratios) or any(b > a for a, b in zip(self.ratios, self.ratios[1:])):
            raise ValueError(f"ratios are {self.ratios}, expected within 0..1, never rising")
        return self

    def shares(self) -> dict[int, Fraction]:
        """Layer -> share as the preset wrote it: 0.29 of 100 is 29."""
        return {layer: Fraction(str(ratio)).limit_denominator(10**6) for layer, ratio in zip(self.layers, self.ratios)}


class TokensOptions(Options):
    """Positions of pictures are dropped inside the decoder, in training and in prefill (pyramiddrop)."""

    at: Literal["decoder"] = "decoder"
    score: Annotated[AttentionFromRowsOptions, Field()] = AttentionFromRowsOptions()
    select: Annotated[TopKOptions, Field()] = TopKOptions()
    apply: Annotated[GatherOptions, Field()] = GatherOptions()
    keep: Annotated[StagesOptions, Field()]

    def reducer(self, layout: Layout) -> TokenReducer:
        """The reducer of one pass over rows of this layout, before any drop."""
        return TokenReducer(layout, self.keep.shares(), renumber=self.apply.positions == "renumber")
