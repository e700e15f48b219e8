"""Q-Former: learned queries that attend one another and the visual tokens. Source: mblip (BLIP-2).

n rows, N tokens, d_v width of the tower, K queries, C their width, d width of the language model.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.connectors.base import Connector, Grid, any_valid
from vlm.connectors.query_layers import QFormerLayer, QueryOptions, initialise
from vlm.layers import norm_of


class QFormerOptions(QueryOptions):
    """Learned queries, layers of self-attention, cross-attention and feed-forward, then one linear layer."""

    kind: Literal["qformer"] = "qformer"
    queries: int = Field(32, gt=0, description="learned queries K: positions of a picture")
    width: int | None = Field(None, gt=0, description="channels C of the queries; default: the language model's width")
    cross_every: Literal[1, 2] = Field(2, description="cross-attention in every layer or in every second, from the first")
    norm_order: Literal["post", "pre"] = Field("post", description="post: norm of the sum (BLIP-2); pre: before a layer")

    def build(self, width_in: int, width_out: int, grid: Grid | None) -> QFormer:
        return QFormer(self, width_in, width_out, grid)


class QFormer(Connector):
    """K = queries, whatever N is. A row without a valid token gives 0 and is masked.

    `projection` is the only part whose shape depends on the language model, if `width` is given: it alone is new when
    the language model is changed (mblip).
    """

    def __init__(self, options: QFormerOptions, width_in: int, width_out: int, grid: Grid | None) -> None:
        super().__init__(width_in, width_out, grid)
        width = options.width or width_out
        shape = options.trunk(width)
        post = options.norm_order == "post"
        self.queries = nn.Parameter(torch.randn(options.queries, width) * width**-0.5)
        self.norm = norm_of(options.norm, width, options.norm_eps)  # post: of the queries; pre: of the result
        self.post_norm = post
        self.layers = nn.ModuleList(
            QFormerLayer(shape, width_in, cross=layer % options.cross_every == 0, post_norm=post)
            for layer in range(options.depth)
        )
        initialise(self.layers, options.depth)
        self.projection = nn.Linear(width, width_out)

    def count(self, N: int) -> int:
        return self.queries.shape[0]

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self.queries.expand(tokens.shape[0], -1, -1)
        x = self.norm(x) if self.post_norm else x
        for layer in self.layers:
            x = layer(x, tokens, mask)
        x = x if self.post_norm else self.norm(x)
        return self.projection(x), any_valid(mask, self.queries.shape[0])
