"""One linear layer from visual tokens to the language model's space. Source: limber.

n rows, N tokens, d_v width of the tower, K positions, d width of the language model.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from vlm.connectors.base import Connector, ConnectorBase, Grid, any_valid


class LinearOptions(ConnectorBase):
    """A linear layer, with no norm and no activation."""

    kind: Literal["linear"] = "linear"
    tokens: Literal["grid"] | Annotated[int, Field(gt=0)] = Field(
        "grid", description="grid: one position a token; k: k positions from the mean of the tokens"
    )
    dropout: float = Field(0.1, ge=0, lt=1, description="share of the visual features that training drops")
    bias: bool = Field(True, description="bias of the layer")

    def build(self, width_in: int, width_out: int, grid: Grid | None) -> LinearConnector:
        return LinearConnector(self, width_in, width_out, grid)


class LinearConnector(Connector):
    """tokens = "grid": d_v d + d parameters and K = N. tokens = k: k times as many, and K = k.

    With k the tokens of a row are averaged over the valid ones first; a tower that gives one pooled vector gives
    N = 1, which is its own mean.
    """

    def __init__(self, options: LinearOptions, width_in: int, width_out: int, grid: Grid | None) -> None:
        super().__init__(width_in, width_out, grid)
        self.tokens = None if options.tokens == "grid" else int(options.tokens)
        self.dropout = nn.Dropout(options.dropout)
        self.projection = nn.Linear(width_in, width_out * (self.tokens or 1), bias=options.bias)

    def count(self, N: int) -> int:
        if self.tokens is None:
            self._check_grid(N)
            return N
        return self.tokens

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.tokens is None:
            return self.projection(self.dropout(tokens)), mask
        if mask is None:
            pooled = tokens.mean(1)
        else:
            pooled = tokens.sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(tokens.dtype)
        made = self.projection(self.dropout(pooled)).reshape(tokens.shape[0], self.tokens, self.width_out)
        return made, any_valid(mask, self.tokens)
