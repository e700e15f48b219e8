"""The decoder as graphs: tensors in, tensors out, every mask explicit, no length ever asked for.

b rows, s new positions, p cached ones, C width, V vocabulary, G key and value heads, D head width, M visual tokens beside
a row. Traced by the exporter; `run_decoder` computes the same where lengths may be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.layers import Attention, Trunk
from vlm.types.export import ExportPart

if TYPE_CHECKING:
    from vlm.models.cross import GatedCrossBlock

Rotary = tuple[Tensor, Tensor]
LOWEST = torch.finfo(torch.float32).min
"""Added to the logit of a key that is not seen. Finite: a row without any key gives no NaN."""


class Decoder(Protocol):
    """What the graphs read of a language model."""

    options: Any
    tokens: nn.Embedding
    trunk: Trunk
    post_norm: nn.Module

    @property
    def head_weight(self) -> Tensor: ...


class EmbedGraph(nn.Module):
    """input_ids [b, s] -> inputs_embeds [b, s, C]."""

    def __init__(self, tokens: nn.Embedding) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class DecoderGraph(nn.Module):
    """New positions behind cached ones, for prefill (p = 0) and decoding alike.

    (inputs_embeds [b, s, C], attention_mask [b, p + s] int64, position_ids [b, s], past keys and values [b, G, p, D] of
    each layer) -> (logits [b, V] at the last valid new position, present keys and values [b, G, p + s, D] of each layer).
    With cross blocks, before the past: cross_mask [b, s, M], 1 where a position sees a visual token, and the keys and
    values [b, G, M, D] of each cross block.
    """

    def __init__(self, language: Decoder, cross: dict[int, GatedCrossBlock] | None = None) -> None:
        super().__init__()
        self.language = language
        self.layers = tuple(cross or ())
        self.cross = nn.ModuleList((cross or {}).values())

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        blocks: Any = self.language.trunk.blocks
        cross_mask, beside, past = rest[:1], rest[1 : 1 + 2 * len(self.layers)], rest
        if self.layers:
            past = rest[1 + 2 * len(self.layers) :]
        bias, valid = causal_bias(attention_mask, past[0].shape[2], inputs_embeds.shape[1])
        rotary = self.language.trunk.rotary(position_ids)
        x, present = inputs_embeds, []
        for number, block in enumerate(blocks):
            x, keys, values = extend(block, x, past[2 * number], past[2 * number + 1], bias, rotary)
            present += [keys, values]
            if number + 1 in self.layers:
                at = self.layers.index(number + 1)
                x = gated(self.cross[at], x, beside[2 * at], beside[2 * at + 1], cross_mask[0])
        return (last_logits(self.language, x, valid), *present)


class CrossKeysGraph(nn.Module):
    """visual_tokens [n, K, C] of pictures -> keys and values [n, G, K, D] of each cross block."""

    def __init__(self, blocks: Sequence[GatedCrossBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, visual_tokens: Tensor) -> tuple[Tensor, ...]:
        out: list[Tensor] = []
        for block in self.blocks:
            attention: Any = block.attention
            out += attention.keys_values(visual_tokens)
        return tuple(out)


def causal_bias(attention_mask: Tensor, past: int, new: int) -> tuple[Tensor, Tensor]:
    """(what is added to the logits [b, 1, s, p + s], valid new positions [b, s] bool)."""
    place = torch.arange(past + new, device=attention_mask.device)
    own = torch.arange(new, device=attention_mask.device) + past
    # Looked up by place, so that the mask's length need not be proven equal to p + s.
    mask = attention_mask.index_select(1, place) > 0
    sees = mask[:, None, None, :] & (place[None, :] <= own[:, None])
    # Padding sees itself: what attention makes of a row without any key is not the same everywhere.
    sees = sees | (place[None, :] == own[:, None])
    return hidden_bias(sees), mask.index_select(1, own)


def hidden_bias(sees: Tensor) -> Tensor:
    """bool -> 0 where a key is seen, LOWEST where not."""
    return torch.where(sees, 0.0, LOWEST)


def extend(block: Any, x: Tensor, past_keys: Tensor | None, past_values: Tensor | None, bias: Tensor, rotary: Rotary | None) -> Any:
    """`Block.extend` with the mask as a bias: (x, keys, values [b, G, p + s, D])."""
    y = block.norm1(x)
    q = block.attention.queries(y, rotary)
    k, v = block.attention.keys_values(y, rotary)
    if past_keys is not None and past_values is not None:
        k, v = torch.cat([past_keys, k], dim=2), torch.cat([past_values, v], dim=2)
    x = x + attend(block.attention, q, k, v, bias)
    return x + block.ffn(block.norm2(x)), k, v


def attend(attention: Attention, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """q [b, H, s, D], k, v [b, G, m, D], bias broadcastable to [b, H, s, m] -> [b, s, C]."""
    repeat = attention.heads // attention.kv_heads
    if repeat > 1:
        k, v = (t[:, :, None].expand(-1, -1, repeat, -1, -1).reshape(t.shape[0], -1, t.shape[2], t.shape[3]) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return attention.out(y.transpose(1, 2).reshape(q.shape[0], q.shape[2], attention.heads * attention.head_width))


def gated(block: Any, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """A cross block on x [b, s, C]; mask [b, s, M], 1 where a position sees a visual token. Exactly x where it sees none."""
    sees = mask > 0
    some = mask.amax(-1, keepdim=True) > 0
    seen = attend(block.attention, block.attention.queries(block.norm1(x)), keys, values, hidden_bias(sees[:, None]))
    x = x + torch.where(some, block.attention_gate.tanh() * seen, 0.0)
    return x + torch.where(some, block.ffn_gate.tanh() * block.ffn(block.norm2(x)), 0.0)


def last_logits(language: Decoder, x: Tensor, valid: Tensor) -> Tensor:
    """[b, V] at the last valid position of each row, the first of an empty one."""
    place = torch.arange(x.shape[1], device=x.device)
    at = (valid.to(torch.int64) * place).amax(1)
    chosen = x.gather(1, at[:, None, None].expand(-1, -1, x.shape[2]))[:, 0]
    return language.post_norm(chosen) @ language.head_weight.T


# The parts of a bundle


def embed_part(language: Decoder) -> ExportPart:
    """`embed`: ids to embeddings."""
    ids = torch.ones(2, 4, dtype=torch.int64)
    return ExportPart(EmbedGraph(language.tokens), {"input_ids": ids}, {"input_ids": {0: "batch", 1: "length"}}, ["inputs_embeds"])


def decoder_part(language: Decoder, cross: dict[int, GatedCrossBlock] | None = None) -> ExportPart:
    """The decoder with its cache as inputs and outputs."""
    inputs, dynamic = new_inputs(language, new=4, total=7)
    if cross:
        inputs["cross_mask"] = torch.ones(2, 4, 5, dtype=torch.int64)
        dynamic["cross_mask"] = {0: "batch", 1: "length", 2: "visual"}
        for name in cross_names(cross):
            inputs[name], dynamic[name] = kept_example(language, 5), {0: "batch", 2: "visual"}
    for name in cache_names(language.options.depth, "past_key_values"):
        inputs[name], dynamic[name] = kept_example(language, 3), {0: "batch", 2: "past"}
    outputs = ["logits", *cache_names(language.options.depth, "present")]
    return ExportPart(DecoderGraph(language, cross), inputs, dynamic, outputs)


def cross_part(language: Decoder, cross: dict[int, GatedCrossBlock], tokens: int) -> ExportPart:
    """`cross`: the keys and values of pictures in each cross block. tokens: K."""
    example = torch.rand(2, tokens, language.options.width)
    return ExportPart(
        CrossKeysGraph(list(cross.values())), {"visual_tokens": example}, {"visual_tokens": {0: "batch"}}, list(cross_names(cross))
    )


def new_inputs(language: Decoder, *, new: int, total: int) -> tuple[dict[str, Tensor], dict[str, dict[int, str]]]:
    """Examples of the inputs that new positions have in every graph, and their free axes."""
    inputs = {
        "inputs_embeds": torch.rand(2, new, language.options.width),
        "attention_mask": torch.ones(2, total, dtype=torch.int64),
        "position_ids": torch.arange(total - new, total).expand(2, -1).contiguous(),
    }
    dynamic = {
        "inputs_embeds": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "length"},
    }
    return inputs, dynamic


def kept_example(language: Decoder, positions: int) -> Tensor:
    """Keys or values [2, G, positions, D]."""
    attention: Any = language.trunk.blocks[0].attention
    return torch.rand(2, attention.kv_heads, positions, attention.head_width)


def cache_names(depth: int, prefix: str) -> list[str]:
    """prefix.0.key, prefix.0.value, prefix.1.key, ..."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(depth) for kind in ("key", "value")]


def cross_names(layers: Sequence[int] | dict[int, Any]) -> list[str]:
    """cross.LAYER.key, cross.LAYER.value: the block that stands after decoder layer LAYER, counted from 1."""
    return [f"cross.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
