"""Layers of learned queries that read visual tokens, and how they start.

n rows, K queries, N tokens, C width of the queries, d_v width of the tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.layers import Attention, FeedForward, TrunkOptions, norm_of


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


def trunk_options(
    width: int, depth: int, heads: int, head_width: int | None, ffn_width: int | None, **rest: object
) -> TrunkOptions:
    """The shape of a stack of these layers. Raises RequestError where the heads do not divide the width."""
    if head_width is None and width % heads:
        raise RequestError(
            f"{heads} heads do not divide the connector's width {width}",
            where="connector.heads",
            remedy="choose a divisor, or say head_width",
        )
    values = {"width": width, "depth": depth, "heads": heads, "head_width": head_width, "ffn_width": ffn_width or 4 * width}
    return TrunkOptions.model_validate({**values, **rest})


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
