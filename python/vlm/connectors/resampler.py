"""Perceiver resampler: latents that read the visual tokens layer by layer. Source: cosmo (Flamingo).

n rows, N tokens, d_v width of the tower, K latents, C their width, d width of the language model.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.connectors.base import Connector, Grid, any_valid
from vlm.connectors.query_layers import QueryOptions, ResamplerLayer, initialise
from vlm.layers import norm_of


class ResamplerOptions(QueryOptions):
    """Learned latents, layers of cross-attention and feed-forward, a norm, then one linear layer."""

    kind: Literal["resampler"] = "resampler"
    latents: int = Field(64, gt=0, description="learned latents K: positions of a picture")
    width: int | None = Field(None, gt=0, description="channels C of the latents; default: the tower's width")
    concat_latents: bool = Field(True, description="latents attend the tokens and themselves; false: the tokens alone")
    bias: bool = Field(False, description="biases in attention and feed-forward layers")

    def build(self, width_in: int, width_out: int, grid: Grid | None) -> Resampler:
        return Resampler(self, width_in, width_out, grid)


class Resampler(Connector):
    """K = latents, whatever N is. A row without a valid token gives 0 and is masked.

    Tokens of another width than the latents pass a linear layer first (`entry`).
    """

    def __init__(self, options: ResamplerOptions, width_in: int, width_out: int, grid: Grid | None) -> None:
        super().__init__(width_in, width_out, grid)
        width = options.width or width_in
        shape = options.trunk(width)
        self.concat_latents = options.concat_latents
        self.entry = None if width == width_in else nn.Linear(width_in, width)
        self.latents = nn.Parameter(torch.randn(options.latents, width))
        self.layers = nn.ModuleList(ResamplerLayer(shape) for _ in range(options.depth))
        initialise(self.layers, options.depth)
        self.norm = norm_of(options.norm, width, options.norm_eps)
        self.projection = nn.Linear(width, width_out)

    def count(self, N: int) -> int:
        return self.latents.shape[0]

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        tokens = tokens if self.entry is None else self.entry(tokens)
        x = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            x = layer(x, tokens, mask, self.concat_latents)
        return self.projection(self.norm(x)), any_valid(mask, self.latents.shape[0])
