"""Exact attention inside a language model: `attention = { kind = "exact", ... }`. Source: lm-infinite, budget-longformer.

n rows, N queries, M keys. The rank of a token counts the tokens before it in its document; padding has none. Masks go by
ranks, so neither padding nor packing moves a window or the first tokens of a document.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from vlm.attention.exact import (
    BlockCausalMask,
    CausalMask,
    ExactAttention,
    ExactAttentionOptions,
    LambdaMask,
    MaskOptions,
    NoBias,
    SymmetricWindowMask,
    WindowMask,
)


class TrunkAttentionOptions(ExactAttentionOptions):
    """Softmax attention over the keys that a mask allows, inside documents. A position bias stands in place of rotary
    positions; `heads` is the model's."""

    global_tokens: int = Field(0, ge=0, description="first tokens of each document that see all and are seen by all, beyond the window")
    global_projections: bool = Field(
        False, description="global tokens look with queries, keys and values of their own (encoders: causal = false)"
    )
    distance_cap: int | None = Field(
        None, gt=0, description="greatest distance of rotary positions: the lambda's window, at which the first tokens stay"
    )
    cache: Literal["whole", "rolling"] = Field(
        "whole", description="what decoding keeps: every key, or the window and the first tokens of a lambda"
    )

    @model_validator(mode="after")
    def _heads_are_known(self) -> TrunkAttentionOptions:
        return self  # the model fills them in

    @model_validator(mode="after")
    def _fits_a_row_of_text(self) -> TrunkAttentionOptions:
        if self.alignment != "bottom-right":
            raise ValueError("a language model appends to its keys: alignment must be bottom-right")
        if any(isinstance(mask, BlockCausalMask) for mask in self.mask):
            raise ValueError("blocks of positions do not follow documents: block-causal has no meaning here")
        near = [mask for mask in self.mask if not isinstance(mask, CausalMask)]
        if len(near) > 1:
            raise ValueError(f"one window at most, and there are {len(near)}: {', '.join(mask.kind for mask in near)}")
        if self.distance_cap is not None:
            if not isinstance(self.near, LambdaMask) or self.distance_cap != self.near.window:
                raise ValueError("distance_cap goes with a lambda mask and equals its window")
            if not isinstance(self.bias, NoBias):
                raise ValueError("distance_cap is of rotary positions; that of ALiBi is bias.cap")
        if self.global_tokens and isinstance(self.near, LambdaMask):
            raise ValueError("a lambda mask has sinks in place of global_tokens")
        if self.global_projections and not self.global_tokens:
            raise ValueError("global_projections without global_tokens")
        if self.cache == "rolling" and (not isinstance(self.near, LambdaMask | WindowMask) or self.global_tokens):
            raise ValueError('cache = "rolling" goes with a causal window or a lambda mask and without global_tokens')
        if self.cache == "rolling" and isinstance(self.near, WindowMask) and not self.near.causal:
            raise ValueError('cache = "rolling" goes with a causal window')
        return self

    @property
    def plain(self) -> bool:
        """Whether a causal model with these options is one without them."""
        own, usual = (options.model_dump(exclude={"mask", "heads"}) for options in (self, TrunkAttentionOptions()))
        return self.near is None and own == usual

    @property
    def near(self) -> MaskOptions | None:
        """The window, symmetric window or lambda, if there is one."""
        return next((mask for mask in self.mask if not isinstance(mask, CausalMask)), None)

    @property
    def reach(self) -> int | None:
        """Distances below it are near; None: all are."""
        near = self.near
        if isinstance(near, LambdaMask):
            return near.window
        if isinstance(near, WindowMask):
            return near.size
        return near.size // 2 + 1 if isinstance(near, SymmetricWindowMask) else None

    @property
    def sinks(self) -> int:
        """First tokens of a document that every later one sees."""
        return self.near.sinks if isinstance(self.near, LambdaMask) else 0

    @property
    def one_way(self) -> bool:
        """Whether the mask alone hides later positions."""
        near = self.near
        causal = isinstance(near, LambdaMask) or (isinstance(near, WindowMask) and near.causal)
        return causal or any(isinstance(mask, CausalMask) for mask in self.mask)

    @property
    def rotary(self) -> bool:
        """Whether positions are rotary."""
        return isinstance(self.bias, NoBias)

    def core(self, heads: int) -> ExactAttention:
        """What a layer holds: bias, temperature, dropout; the mask is made anew for each pass."""
        fields = {name: getattr(self, name) for name in ExactAttentionOptions.model_fields}
        return ExactAttentionOptions(**fields | {"kind": "exact", "mask": [], "heads": heads}).build()


__all__ = ["TrunkAttentionOptions"]
