"""Connectors: from the tokens of a vision tower to the width of a language model.

n pictures, N tokens, K tokens out.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from vlm.config.options import Options


class LinearOptions(Options):
    """One linear layer on every token (limber)."""

    kind: Literal["linear"] = "linear"
    dropout: float = Field(0.0, ge=0, lt=1, description="on the tower's tokens")

    def build(self, width_in: int, width_out: int, grid: tuple[int, int] | None) -> LinearConnector:
        return LinearConnector(self, width_in, width_out)


class LinearConnector(nn.Module):
    """[n, N, width_in] to [n, N, width_out]."""

    def __init__(self, options: LinearOptions, width_in: int, width_out: int) -> None:
        super().__init__()
        self.dropout = nn.Dropout(options.dropout)
        self.linear = nn.Linear(width_in, width_out)

    def forward(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.linear(self.dropout(tokens)), mask

    def count(self, tokens: int) -> int:
        """Tokens out for `tokens` in."""
        return tokens


ConnectorOptions = LinearOptions

__all__ = ["ConnectorOptions", "LinearConnector", "LinearOptions"]
