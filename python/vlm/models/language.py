"""Language model: a decoder over token ids, in the Llama layout and near it.

n rows, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.attention import DecoderAttention, MixerOptions, TrunkAttentionOptions, sees_all
from vlm.config.errors import RequestError
from vlm.config.options import Options
from vlm.layers import Activation, NormKind, RmsNorm, Trunk, TrunkOptions, norm_of
from vlm.models.adapted import weight_of
from vlm.models.base import Model
from vlm.models.decoder import Cache, DecoderResult, run_decoder
from vlm.models.graphs import decoder_part, embed_part
from vlm.models.replaced import ReplacedOptions, Replacement, Replacer
from vlm.models.trunks import trunk_of
from vlm.types import Batch, Layout, Outputs, Pictures, TokenIds, Vocabulary, VocabularyLayout
from vlm.types.export import ExportPart
from vlm.types.outputs import Wanted, layers_of


class LanguageOptions(Options):
    """A decoder-only transformer; the defaults are Llama's."""

    kind: Literal["language"] = "language"
    width: int = Field(gt=0, description="channels C")
    depth: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="query heads")
    kv_heads: int | None = Field(None, gt=0, description="key and value heads; default: heads")
    head_width: int | None = Field(None, gt=0, description="channels of one head; default: width / heads")
    ffn_width: int = Field(gt=0, description="hidden channels of the feed-forward layer")
    ffn: Literal["mlp", "gated"] = "gated"
    activation: Activation = "silu"
    norm: NormKind = "rmsnorm"
    norm_eps: float = Field(1e-6, gt=0)
    bias: bool = False
    qkv_bias: bool | None = Field(None, description="biases of queries, keys and values (Qwen2); default: bias")
    rope_theta: float = Field(10000.0, gt=0)
    length: int = Field(gt=0, description="greatest number of tokens the positions are made for")
    vocab_size: int | None = Field(None, gt=0, description="number of token ids; default: the tokenizer's")
    tie_embeddings: bool = Field(True, description="input embedding and output head share their weight")
    embed_scale: bool = Field(False, description="embeddings are multiplied by the root of the width")
    mixer: MixerOptions | None = Field(
        None, description="recurrent layer in place of attention, which has positions of its own: linear-decay or ssm"
    )

    attention: DecoderAttention | None = Field(
        None,
        description="mask, position bias and cache of the attention (exact), or what queries see of what was read when it writes "
        "(windowed, hierarchical, block-memory); default: all earlier keys, rotary positions",
    )
    causal: bool = Field(True, description="false: an encoder, whose positions see those after them too; it writes nothing")
    replaced: ReplacedOptions | None = Field(None, description="generator of the objective replaced-token, for an encoder")

    @model_validator(mode="after")
    def _heads_fit(self) -> LanguageOptions:
        if self.mixer is not None and self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads {self.heads} is not a multiple of kv_heads {self.kv_heads}")
        if self.mixer is not None and (self.attention is not None or not self.causal):
            raise ValueError("a mixer stands in place of attention, and reads from left to right")
        if self.replaced is not None and self.causal:
            raise ValueError("replaced tokens are told from both sides: replaced is for encoders, causal = false")
        if isinstance(self.attention, TrunkAttentionOptions) and self.attention.global_projections and self.causal:
            raise ValueError("attention.global_projections is for encoders: causal = false")
        if not (self.causal or self.attention is None or isinstance(self.attention, TrunkAttentionOptions)):
            raise ValueError(f"attention of kind {self.attention.kind!r} reads from left to right: an encoder takes exact")
        return self

    @property
    def sees_all_before(self) -> bool:
        """Whether a position attends itself and everything before it, which is what published forms and graphs say."""
        return self.mixer is None and self.causal and sees_all(self.attention)

    @property
    def text_length(self) -> int:
        """Greatest number of tokens of a text."""
        return self.length

    def filled(self, vocabulary: VocabularyLayout) -> LanguageOptions:
        return self.model_copy(update={"vocab_size": self.vocab_size or vocabulary.size})

    def build(self, vocabulary: VocabularyLayout) -> LanguageModel:
        return LanguageModel(self.filled(vocabulary), vocabulary)

    def trunk(self) -> TrunkOptions:
        shared = {name: getattr(self, name) for name in TrunkOptions.model_fields}
        return TrunkOptions(**shared)


class LanguageModel(Model):
    """Token rows to (hidden, weight) of the vocabulary logits; packed documents never see one another."""

    kind: ClassVar[str] = "language"
    offers: ClassVar[dict[str, frozenset[str]]] = {"tokens": frozenset({"vocabulary", "hidden", "embedding", "statistics"})}

    def __init__(self, options: LanguageOptions, vocabulary: VocabularyLayout) -> None:
        super().__init__()
        if options.vocab_size is None:
            raise ValueError("the language model needs vocab_size, from the preset or the tokenizer")
        self.options: LanguageOptions = options
        self.vocabulary = vocabulary
        self.tokens: nn.Embedding = TokenEmbedding(options.vocab_size, options.width, options.embed_scale)
        self.trunk: Trunk = trunk_of(options.trunk())
        self.post_norm = norm_of(options.norm, options.width, options.norm_eps)
        self.head = None if options.tie_embeddings else nn.Linear(options.width, options.vocab_size, bias=False)
        self.replacer = None if options.replaced is None else Replacer(options.replaced, options.trunk())
        nn.init.normal_(self.tokens.weight, std=0.02)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    @property
    def head_weight(self) -> Tensor:
        """[V, C]"""
        return self.tokens.weight if self.head is None else weight_of(self.head)

    def run(self, ids: Tensor, *, collect: Collection[int] = ()) -> tuple[Tensor, dict[int, Tensor]]:
        """Right-padded ids [n, T] -> (hidden after the final norm [n, T, C], hidden states by layer)."""
        x, hidden = self.trunk(self.tokens(ids), causal=self.options.causal, collect=collect)
        return self.post_norm(x), hidden

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Outputs by stream: `vocabulary`, `hidden:L`, `embedding` (mean of the last states of a row) and `statistics` (what the
        objective replaced-token reads), with the layout that labels come from."""
        out = {}
        for name, fields in wanted.items():
            stream = batch[name]
            if not isinstance(stream, TokenIds):
                raise TypeError(f"a language model reads tokens, stream {name!r} is {type(stream).__name__}")
            layout, ids = layout_of(stream), stream.values
            replacement = None
            if "statistics" in fields:
                if self.replacer is None:
                    raise ValueError("a language model has statistics of replaced tokens alone: give it [model.replaced]")
                replacement = self.replacer.replace(layout, ids, self.tokens, tuple(self.vocabulary.special.values()))
                ids = replacement.ids
            result = run_decoder(self.trunk, self.tokens(ids), layout, collect=layers_of(fields))
            out[name] = self.outputs(result, stream, fields, replacement)
        return out

    def outputs(
        self, result: DecoderResult, stream: TokenIds, fields: frozenset[str], replacement: Replacement | None = None
    ) -> Outputs:
        """What was asked for of a pass over the rows of `stream`, with what was replaced in them."""
        wants = replacement is not None or not fields.isdisjoint({"vocabulary", "embedding"})
        last = self.post_norm(result.x) if wants else result.x
        vocabulary = Vocabulary(last, self.head_weight) if "vocabulary" in fields else None
        statistics: dict[str, Tensor] = {}
        if replacement is not None and self.replacer is not None:
            statistics = {"detection": self.replacer.detect(last), "replaced": replacement.replaced, "hidden": replacement.hidden,
                          "nats": replacement.nats}
        return Outputs(
            sample_index=stream.sample_index,
            mask=stream.mask.any(1),
            embedding=_mean(last, result.layout.mask) if "embedding" in fields else None,
            vocabulary=vocabulary,
            hidden=result.hidden,
            statistics=statistics,
            layout=result.layout,
            layouts=result.layouts,
        )

    def prefill(self, text: TokenIds, pictures: Mapping[str, Pictures]) -> tuple[Tensor, Cache]:
        """Prompts to (logits [n, V] of the token after each, their cache). Raises ValueError for pictures."""
        if any(len(stream) for stream in pictures.values()):
            raise ValueError("a language model reads no pictures")
        result = run_decoder(self.trunk, self.tokens(text.values), layout_of(text), keep_cache=True)
        return self.last_logits(result), _cache_of(result)

    def advance(self, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One more token a row, ids [n] -> (logits [n, V], the longer cache)."""
        rows = torch.arange(len(ids), device=ids.device)
        layout = Layout.of_tokens(ids[:, None], torch.ones_like(ids[:, None], dtype=torch.bool), rows)
        result = run_decoder(self.trunk, self.tokens(ids[:, None]), layout, cache=cache)
        return self.last_logits(result), _cache_of(result)

    def last_logits(self, result: DecoderResult) -> Tensor:
        """[n, V] logits at the last valid position of each row (the first position of an empty one)."""
        mask = result.layout.mask
        place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        at = torch.where(mask, place, 0).argmax(1)
        x = result.x[torch.arange(len(at), device=at.device), at]
        return self.post_norm(x) @ self.head_weight.T

    def export_parts(self) -> dict[str, ExportPart]:
        """A recurrent mixer has the graph of whole rows alone: its bundle scores texts and writes none.

        Raises RequestError for a mixer whose scan has no form in standard operators that would fit in memory, and for
        attention to some keys alone, which a graph does not choose.
        """
        refuse_chosen_keys(self.options)
        mixer = self.options.mixer
        if mixer is not None and not mixer.exports:
            raise RequestError(f"a language model with the mixer {mixer.kind!r} cannot be exported",
                               remedy="export one with attention or with mixer.kind = \"linear-decay\"")
        ids = torch.ones(2, min(self.options.length, 16), dtype=torch.int64)
        axes = {0: "batch", 1: "length"}
        whole = {"decoder": ExportPart(_DecoderGraph(self), {"input_ids": ids}, {"input_ids": axes}, ["logits"])}
        if mixer is not None:
            return whole
        return whole | {
            "embed": embed_part(self),
            "decoder_with_past": decoder_part(self),
        }


def refuse_chosen_keys(options: LanguageOptions) -> None:
    """Raises RequestError for attention to some keys alone, and for an encoder: the graphs of a bundle see every key before."""
    attention = options.attention
    masked = isinstance(attention, TrunkAttentionOptions) and not attention.plain
    if options.mixer is None and (masked or not options.causal):
        raise RequestError("a language model with attention under a mask, or an encoder, cannot be exported",
                           remedy="train and score it here; drop [model.attention] to export a model that needs none")
    if attention is not None and not sees_all(attention):
        raise RequestError(f"a language model with attention of kind {attention.kind!r} cannot be exported",
                           remedy="export the model that it was made from, which sees every key")


class TokenEmbedding(nn.Embedding):
    """ids -> [..., C], multiplied by the root of C if asked."""

    def __init__(self, size: int, width: int, scaled: bool) -> None:
        super().__init__(size, width)
        self.factor = width**0.5 if scaled else 1.0

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        return x if self.factor == 1.0 else x * self.factor


class _DecoderGraph(nn.Module):
    """Right-padded ids to logits; padding comes after every valid token and is never attended."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        x, _ = self.model.run(input_ids)
        return x @ self.model.head_weight.T


def layout_of(stream: TokenIds) -> Layout:
    """The layout of token rows without pictures."""
    return Layout.of_tokens(
        stream.values,
        stream.mask,
        stream.sample_index,
        segment=stream.segment,
        position=stream.position,
        supervised=stream.supervised,
        target=stream.target,
        role=stream.role,
    )


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    """x [n, T, C] over the valid positions -> [n, C]; 0 for a row without one."""
    return x.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def _cache_of(result: DecoderResult) -> Cache:
    assert result.cache is not None
    return result.cache


__all__ = ["LanguageModel", "LanguageOptions", "RmsNorm", "layout_of"]
