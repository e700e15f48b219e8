"""The graphs of a bundle: pictures to visual tokens, ids to embeddings, and the decoder with its past.

b rows, s new positions, p past ones, P rows of pictures, K visual tokens, C width, L layers, G key and value heads,
D head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from vlm.models.blocks import Block
from vlm.models.language import LanguageModel
from vlm.types.export import ExportPart


class Sees(Protocol):
    """What turns pixels of its towers into visual tokens."""

    def visual_tokens(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]: ...


class VisionGraph(nn.Module):
    """Normalised pixels [P, 3, S, S] -> visual tokens [P, K, C], the connector included."""

    def __init__(self, model: Sees, tower: str) -> None:
        super().__init__()
        self.model = model
        self.tower = tower

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.visual_tokens({self.tower: pixel_values})[0]


class EmbedGraph(nn.Module):
    """ids [b, s] -> embeddings [b, s, C]."""

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.tokens = language.tokens

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.tokens(input_ids)


class DecoderGraph(nn.Module):
    """New positions behind past ones; one graph reads a prompt (p = 0) and goes on token by token.

    Rows are padded on the left: the last position of each is valid.
    """

    def __init__(self, language: LanguageModel) -> None:
        super().__init__()
        self.language = language

    def forward(
        self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor, past_keys: Tensor, past_values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """inputs_embeds [b, s, C], attention_mask int64 [b, p + s], position_ids [b, s], past [b, L, G, p, D] ->
        (logits [b, V] of the last position, present keys and values [b, L, G, p + s, D])."""
        trunk, x, key_mask = self.language.trunk, inputs_embeds, attention_mask.bool()
        rotary = trunk.rotary(position_ids)
        keys, values = [], []
        for number, block in enumerate(trunk.blocks):
            assert isinstance(block, Block)
            x, k, v = block.extend(x, (past_keys[:, number], past_values[:, number]), key_mask, None, rotary)
            keys.append(k)
            values.append(v)
        logits = self.language.post_norm(x[:, -1]) @ self.language.head_weight.T
        return logits, torch.stack(keys, 1), torch.stack(values, 1)


def vision_part(model: Sees, tower: str, size: int) -> ExportPart:
    pixels = {"pixel_values": torch.rand(2, 3, size, size)}
    return ExportPart(VisionGraph(model, tower), pixels, {"pixel_values": {0: "batch"}}, ["visual_tokens"])


def embed_part(language: LanguageModel) -> ExportPart:
    axes = {0: "batch", 1: "length"}
    return ExportPart(EmbedGraph(language), {"input_ids": torch.ones(2, 3, dtype=torch.int64)}, {"input_ids": axes}, ["embeddings"])


def decoder_part(language: LanguageModel) -> ExportPart:
    options = language.options
    rows, new, past = 2, 3, 4
    shape = (rows, options.depth, options.kv_heads or options.heads, past, options.head_width or options.width // options.heads)
    inputs = {
        "inputs_embeds": torch.rand(rows, new, options.width),
        "attention_mask": torch.ones(rows, past + new, dtype=torch.int64),
        "position_ids": torch.arange(past, past + new).repeat(rows, 1),
        "past_keys": torch.rand(shape),
        "past_values": torch.rand(shape),
    }
    dynamic = {
        "inputs_embeds": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "total"},
        "position_ids": {0: "batch", 1: "length"},
        "past_keys": {0: "batch", 3: "past"},
        "past_values": {0: "batch", 3: "past"},
    }
    return ExportPart(DecoderGraph(language), inputs, dynamic, ["logits", "present_keys", "present_values"])
