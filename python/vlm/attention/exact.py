"""Exact attention as a part: `[attention] kind = "exact"`. Source: core-exact-attention, swin-v2, lm-infinite."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm import ops
from vlm.config.options import Options
from vlm.ops import masks
from vlm.ops.attention_bias import AnyBias, alibi_slopes


class CausalMask(Options):
    """Keys at or before the query."""

    kind: Literal["causal"] = "causal"

    def build(self, alignment: ops.Alignment) -> masks.Atom:
        return masks.Causal(alignment)


class WindowMask(Options):
    """Keys less than `size` positions away, only before the query if `causal`."""

    kind: Literal["window"] = "window"
    size: int = Field(gt=0)
    causal: bool = True

    def build(self, alignment: ops.Alignment) -> masks.Atom:
        return masks.Window(self.size, self.causal, alignment)


class SymmetricWindowMask(Options):
    """Keys at most size // 2 positions away."""

    kind: Literal["window-symmetric"] = "window-symmetric"
    size: int = Field(gt=0)

    def build(self, alignment: ops.Alignment) -> masks.Atom:
        return masks.SymmetricWindow(self.size, alignment)


class BlockCausalMask(Options):
    """Keys of the query's own block of `size` positions and of those before."""

    kind: Literal["block-causal"] = "block-causal"
    size: int = Field(gt=0)

    def build(self, alignment: ops.Alignment) -> masks.Atom:
        return masks.BlockCausal(self.size, alignment)


class LambdaMask(Options):
    """A causal window and the first `sinks` keys."""

    kind: Literal["lambda"] = "lambda"
    window: int = Field(gt=0)
    sinks: int = Field(0, ge=0)

    def build(self, alignment: ops.Alignment) -> masks.Atom:
        return masks.Lambda(self.window, self.sinks, alignment=alignment)


MaskOptions = Annotated[CausalMask | WindowMask | SymmetricWindowMask | BlockCausalMask | LambdaMask, Field(discriminator="kind")]


class NoBias(Options):
    """Nothing is added to the logits."""

    kind: Literal["none"] = "none"


class AlibiBias(Options):
    """-slope_h * min(distance, cap) with ALiBi's series of slopes."""

    kind: Literal["alibi"] = "alibi"
    cap: int | None = Field(None, gt=0, description="largest distance that counts")
    learned: bool = Field(False, description="whether the slopes are trained")


class BucketBiasOptions(Options):
    """T5's learned table of distance buckets."""

    kind: Literal["t5"] = "t5"
    buckets: int = Field(32, gt=1)
    max_distance: int = Field(128, gt=1)
    bidirectional: bool = True

    @model_validator(mode="after")
    def _far_buckets_exist(self) -> BucketBiasOptions:
        near = self.buckets // (4 if self.bidirectional else 2)
        if near < 1 or self.max_distance <= near:
            raise ValueError(f"{self.buckets} buckets and max_distance {self.max_distance} leave no bucket for far keys")
        return self


BiasOptions = Annotated[NoBias | AlibiBias | BucketBiasOptions, Field(discriminator="kind")]


class ExactAttentionOptions(Options):
    """Softmax attention over every allowed key."""

    kind: Literal["exact"] = "exact"
    scale: float | None = Field(None, gt=0, description="factor on the logits; 1/sqrt(head width) when none")
    alignment: ops.Alignment = Field(
        "bottom-right",
        description="where causal masks end when there are more keys than queries: with the last key "
        "(bottom-right, for caches) or on the main diagonal (top-left)",
    )
    mask: list[MaskOptions] = Field(default_factory=list, description="conditions on pairs, all of which must hold")
    bias: BiasOptions = Field(default_factory=NoBias, description="what is added to the logits by position")
    softcap: float | None = Field(None, gt=0, description="logits become softcap * tanh(logits / softcap)")
    score: Literal["dot", "cosine"] = "dot"
    max_temperature: float = Field(100.0, gt=0, description="clamp of the cosine's learned factor")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of probabilities dropped in training")
    heads: int | None = Field(None, gt=0, description="query heads, for options that hold a number for each head")

    @model_validator(mode="after")
    def _heads_are_known(self) -> ExactAttentionOptions:
        if self.heads is None and (self.score == "cosine" or not isinstance(self.bias, NoBias)):
            raise ValueError("the cosine score and position biases hold a number for each head: say how many heads")
        return self

    def build(self) -> ExactAttention:
        return ExactAttention(self)


class ExactAttention(nn.Module):
    """softmax(score(q, k) + bias) v under a mask, see `vlm.ops.attention`. Holds a temperature for each head if the score
    is the cosine (10 at first), the slopes of ALiBi, and the table of T5's bias (0 at first)."""

    slopes: Tensor | None

    def __init__(self, options: ExactAttentionOptions) -> None:
        super().__init__()
        self.options = options
        self.program = masks.MaskProgram(*(atom.build(options.alignment) for atom in options.mask))
        heads = options.heads or 0
        self.log_temperature = nn.Parameter(torch.full((heads,), 10.0).log()) if options.score == "cosine" else None
        slopes = alibi_slopes(heads) if isinstance(options.bias, AlibiBias) else None
        if isinstance(options.bias, AlibiBias) and options.bias.learned:
            self.slopes = nn.Parameter(alibi_slopes(heads))
        else:
            self.register_buffer("slopes", slopes, persistent=False)
        table = torch.zeros(options.bias.buckets, heads) if isinstance(options.bias, BucketBiasOptions) else None
        self.table = None if table is None else nn.Parameter(table)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
                bias: Tensor | None = None, mask: masks.MaskProgram | masks.Atom | None = None) -> Tensor:
        """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V] -> [B, H, N, V]. `mask` holds beside that of the options; a
        `bias` tensor is added to that of the options."""
        return ops.attention(q, k, v, causal=causal, key_mask=key_mask, bias=self._bias(q, k, bias), **self._settings(mask))

    def with_lse(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None,
                 mask: masks.MaskProgram | masks.Atom | None = None, distance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """As `forward`, with the logarithm of the denominators [B, H, N], for `ops.merge_attention`.

        distance: integer [B | 1, N, M] that the bias of the options goes by, where keys do not stand in their places.
        """
        bias = self._bias(q, k, None) if distance is None else self.bias_at(distance)
        return ops.attention(q, k, v, causal=causal, key_mask=key_mask, bias=bias, return_lse=True, **self._settings(mask))

    def bias_at(self, distance: Tensor) -> Tensor | None:
        """The bias of the options at distances [B, N, M], query minus key -> [B, H, N, M]; None without one."""
        o = self.options.bias
        if isinstance(o, AlibiBias):
            assert self.slopes is not None
            d = distance.abs() if o.cap is None else distance.abs().clamp(max=o.cap)
            return -self.slopes[:, None, None] * d[:, None].to(self.slopes.dtype)
        if isinstance(o, BucketBiasOptions):
            assert self.table is not None
            own = ops.BucketBias(self.table, o.bidirectional, o.max_distance, self.options.alignment)
            return self.table[own.buckets(distance)].movedim(-1, 1)
        return None

    def _settings(self, mask: masks.MaskProgram | masks.Atom | None) -> dict[str, Any]:
        o = self.options
        program = self.program if mask is None else self.program & mask
        temperature = None if self.log_temperature is None else self.log_temperature.exp()
        dropout = (o.dropout, int(torch.randint(2**62, ()))) if o.dropout and self.training else None
        return {"alignment": o.alignment, "scale": o.scale, "mask": program if program.atoms else None, "softcap": o.softcap,
                "score": o.score, "temperature": temperature, "max_temperature": o.max_temperature, "dropout": dropout}

    def _bias(self, q: Tensor, k: Tensor, given: Tensor | None) -> AnyBias | None:
        o = self.options.bias
        if isinstance(o, AlibiBias):
            assert self.slopes is not None
            own: ops.Alibi | ops.BucketBias = ops.Alibi(self.slopes, o.cap, self.options.alignment)
        elif isinstance(o, BucketBiasOptions):
            assert self.table is not None
            own = ops.BucketBias(self.table, o.bidirectional, o.max_distance, self.options.alignment)
        else:
            return given
        if given is None:
            return own
        return given + own.dense(masks.MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device))
