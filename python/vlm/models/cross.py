"""Gated cross-attention: text positions read the visual tokens of the pictures before them.

n rows, N positions, M visual tokens of a row, C width, G key and value heads, D head width. Source: nvlm (forms X and H),
flamingo.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vlm.layers import Attention, FeedForward, TrunkOptions, norm_of
from vlm.models.joining import joined_right
from vlm.types import Layout


class GatedCrossBlock(nn.Module):
    """x += tanh(g_a) XAttn(norm(x), media); x += tanh(g_f) FFN(norm(x)). Both gates start at 0."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.norm1 = norm_of(options.norm, options.width, options.norm_eps)
        self.attention = Attention(options)
        self.attention_gate = nn.Parameter(torch.zeros(()))
        self.norm2 = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)
        self.ffn_gate = nn.Parameter(torch.zeros(()))
        self._initialise(options)

    def _initialise(self, options: TrunkOptions) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor, sees: Tensor) -> Tensor:
        """x [n, N, C]; keys, values [n, G, M, D]; bias [n, 1, N, M], -inf where a token is not to be seen.

        sees [n, N, 1]: positions that see any token; what is added to the others is exactly 0, without gradient.
        """
        nothing = torch.zeros((), dtype=x.dtype, device=x.device)
        seen = self.attention.attend(self.attention.queries(self.norm1(x)), keys, values, bias=bias)
        x = x + torch.where(sees, self.attention_gate.tanh() * seen, nothing)
        return x + torch.where(sees, self.ffn_gate.tanh() * self.ffn(self.norm2(x)), nothing)


@dataclass(frozen=True)
class Media:
    """Visual tokens beside the rows of a text.

    tokens [n, M, C]; mask [n, M] bool; anchor [n, M] int64, the first position (`Layout.kept`) that sees the token: the
    placeholder of its picture; segment [n, M] int64, its document. announced [n, N] int64: the anchor of the tile that a
    position announces, -1 elsewhere: a tag sees its own tile alone. None: no tags.
    """

    tokens: Tensor
    mask: Tensor
    anchor: Tensor
    segment: Tensor
    announced: Tensor | None = None

    def visible(self, layout: Layout) -> Tensor:
        """[n, N, M] bool: tokens of the pictures at or before a position, in its own document; of a tag, its own tile's."""
        before = self.anchor[:, None, :] <= layout.kept[:, :, None]
        if self.announced is not None:
            own = self.announced[:, :, None]
            before = torch.where(own >= 0, self.anchor[:, None, :] == own, before)
        return before & (self.segment[:, None, :] == layout.segment[:, :, None]) & (self.mask[:, None, :] & layout.mask[:, :, None])

    def rows(self, index: Tensor) -> Media:
        """The rows `index`, kept, repeated or reordered."""
        announced = None if self.announced is None else self.announced[index]
        return Media(self.tokens[index], self.mask[index], self.anchor[index], self.segment[index], announced)

    def joined(self, other: Media) -> Media:
        """With the rows of another behind its own. What positions announce is not kept: only what was read before may ask."""
        mine, its = (self.tokens, self.mask, self.anchor, self.segment), (other.tokens, other.mask, other.anchor, other.segment)
        tokens, mask, anchor, segment = (joined_right(a, b, 1) for a, b in zip(mine, its))
        return Media(tokens, mask, anchor, segment)


@dataclass(frozen=True)
class Cross:
    """Cross blocks by the layer after which each stands, and what they read.

    keys_values: those of each block, filled when a cache is kept: the visual tokens of a row never change.
    """

    blocks: Mapping[int, GatedCrossBlock]
    media: Media
    keys_values: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def filled(self) -> Cross:
        """The same with every block's keys and values computed."""
        return replace(self, keys_values={layer: self._keys_values(layer) for layer in self.blocks})

    def _keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.keys_values.get(layer) or self.blocks[layer].attention.keys_values(self.media.tokens)

    def sight(self, layout: Layout, *, appended: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(bias [n, 1, N, M], sees [n, N, 1]) of positions; appended ones follow every picture of their row."""
        if appended:
            visible = layout.mask[:, :, None] & self.media.mask[:, None, :]
        else:
            visible = self.media.visible(layout)
        bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
        return bias[:, None], visible.any(-1, keepdim=True)

    def __call__(self, layer: int, x: Tensor, bias: Tensor, sees: Tensor) -> Tensor:
        """The block after `layer` applied to x [n, N, C]."""
        return self.blocks[layer](x, *self._keys_values(layer), bias, sees)

    def rows(self, index: Tensor) -> Cross:
        """The rows `index`, kept, repeated or reordered."""
        kept = {layer: (keys[index], values[index]) for layer, (keys, values) in self.keys_values.items()}
        return Cross(self.blocks, self.media.rows(index), kept)

    def none_of(self, rows: int) -> Cross:
        """The same blocks with nothing to read, for so many rows."""
        media = Media(*(t.new_zeros(rows, 0, *t.shape[2:]) for t in (self.media.tokens, self.media.mask, self.media.anchor,
                                                                     self.media.segment)))  # fmt: skip
        kept = {layer: (k.new_zeros(rows, k.shape[1], 0, k.shape[3]), v.new_zeros(rows, v.shape[1], 0, v.shape[3]))
                for layer, (k, v) in self.keys_values.items()}  # fmt: skip
        return Cross(self.blocks, media, kept)

    def joined(self, other: Cross) -> Cross:
        """With the rows of another cache's behind its own; both must be `filled`."""
        kept = {
            layer: (joined_right(keys, other.keys_values[layer][0], 2), joined_right(values, other.keys_values[layer][1], 2))
            for layer, (keys, values) in self.keys_values.items()
        }
        return Cross(self.blocks, self.media.joined(other.media), kept)
