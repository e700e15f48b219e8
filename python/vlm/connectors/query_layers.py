"""Layers of learned queries that read visual tokens: what connectors of them have in common.

n rows, K queries, N tokens, C width of the queries, d_v width of the tokens.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.connectors.base import ConnectorBase
from vlm.layers import Activation, Attention, FeedForward, NormKind, TrunkOptions, norm_of


class CrossAttention(Attention):
    """Queries [n, K, C] attend tokens of another width, `context` [n, N, d_v]."""

    def __init__(self, options: TrunkOptions, context_width: int) -> None:
        super().__init__(options)
        inner = self.kv_heads * self.head_width
        self.k = nn.Linear(context_width, inner, bias=options.bias)
        self.v = nn.Linear(context_width, inner, bias=options.bias)


class QFormerLayer(nn.Module):
    """Self-attention of the queries, cross-attention to the tokens where `cross`, feed-forward; each residual.

    post_norm: the norm stands after the sum (BERT, BLIP-2), else before the layer.
    """

    def __init__(self, options: TrunkOptions, context_width: int, *, cross: bool, post_norm: bool) -> None:
        super().__init__()
        self.post_norm = post_norm
        self.norm1 = norm_of(options.norm, options.width, options.norm_eps)
        self.attention = Attention(options)
        self.norm2 = norm_of(options.norm, options.width, options.norm_eps) if cross else None
        self.cross = CrossAttention(options, context_width) if cross else None
        self.norm3 = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """x [n, K, C], tokens [n, N, d_v], mask [n, N] or None -> [n, K, C]"""
        if self.post_norm:
            x = self.norm1(x + self.attention(x))
            if self.cross is not None and self.norm2 is not None:
                x = self.norm2(x + self.cross(x, context=tokens, key_mask=mask))
            return self.norm3(x + self.ffn(x))
        x = x + self.attention(self.norm1(x))
        if self.cross is not None and self.norm2 is not None:
            x = x + self.cross(self.norm2(x), context=tokens, key_mask=mask)
        return x + self.ffn(self.norm3(x))


class ResamplerLayer(nn.Module):
    """Latents attend the tokens, and themselves too where keys join both; then feed-forward; each residual (Flamingo)."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.norm_tokens = norm_of(options.norm, options.width, options.norm_eps)
        self.norm_latents = norm_of(options.norm, options.width, options.norm_eps)
        self.cross = Attention(options)
        self.norm_ffn = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor | None, concat_latents: bool) -> Tensor:
        """x [n, K, C], tokens [n, N, C], mask [n, N] or None -> [n, K, C]"""
        latents, keys = self.norm_latents(x), self.norm_tokens(tokens)
        if concat_latents:
            keys = torch.cat([keys.to(latents.dtype), latents], dim=1)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(x.shape[:2])], dim=1)
        x = x + self.cross(latents, context=keys, key_mask=mask)
        return x + self.ffn(self.norm_ffn(x))


class QueryOptions(ConnectorBase):
    """Learned queries and a stack of layers.

    The layers know no positions: the order of the tokens changes nothing, so the tower must mark theirs.
    """

    depth: int = Field(2, gt=0, description="number of layers")
    heads: int = Field(8, gt=0, description="attention heads")
    head_width: int | None = Field(None, gt=0, description="channels of one head; default: width / heads")
    ffn_width: int | None = Field(None, gt=0, description="hidden channels of the feed-forward layer; default: 4 width")
    activation: Activation = "gelu"
    norm: NormKind = "layernorm"
    norm_eps: float = Field(1e-5, gt=0)
    bias: bool = Field(True, description="biases in attention and feed-forward layers")

    def trunk(self, width: int) -> TrunkOptions:
        """The shape of the stack. Raises RequestError where the heads do not divide the width."""
        if self.head_width is None and width % self.heads:
            raise RequestError(
                f"{self.heads} heads do not divide the connector's width {width}",
                where="connector.heads",
                remedy="choose a divisor, or say head_width",
            )
        return TrunkOptions(
            width=width,
            depth=self.depth,
            heads=self.heads,
            head_width=self.head_width,
            ffn_width=self.ffn_width or 4 * width,
            activation=self.activation,
            norm=self.norm,
            norm_eps=self.norm_eps,
            bias=self.bias,
        )


def initialise(layers: nn.ModuleList, depth: int) -> None:
    """Normal weights by the width that a layer reads, smaller by sqrt(2 depth) where it ends a residual branch, as in
    `Trunk`; biases 0."""
    for layer in layers:
        for name, module in layer.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            ends = name.endswith((".out", ".down"))
            nn.init.normal_(module.weight, std=module.in_features**-0.5 * ((2 * depth) ** -0.5 if ends else 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
