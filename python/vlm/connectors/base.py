"""What every connector has in common: visual tokens of a tower in, positions of a language model out.

n rows (pictures or tiles), N tokens of a row, d_v width of the tower, K positions, d width of the language model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.config.options import Options

Grid = tuple[int, int]
"""Rows and columns of a row's tokens, which come in raster order."""


class ConnectorBase(Options, ABC):
    """Options of one connector; `kind` names it."""

    @abstractmethod
    def build(self, width_in: int, width_out: int, grid: Grid | None) -> Connector:
        """A connector from d_v = width_in to d = width_out with new weights.

        grid: rows and columns of the tokens; None where they form none (one pooled vector, an unknown number).
        Raises RequestError where the options do not fit these numbers.
        """


class Connector(nn.Module, ABC):
    """A module of tokens [n, N, d_v] and mask [n, N] to tokens [n, K, d] and mask [n, K].

    The mask is true where a token is valid. What a masked token holds is never read, NaN included; a masked position
    of the result is 0. Without a mask every token counts and the result has no mask either.
    """

    def __init__(self, width_in: int, width_out: int, grid: Grid | None) -> None:
        super().__init__()
        self.width_in = width_in
        self.width_out = width_out
        self.grid = grid

    @abstractmethod
    def count(self, N: int) -> int:
        """K for a row of N tokens. Raises RequestError where N does not fit the grid."""

    @abstractmethod
    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`forward` for tokens that were checked and are 0 where they are masked."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens [n, N, d_v], mask [n, N] bool or None -> (tokens [n, K, d], mask [n, K] or None).

        No rows give no rows, with gradients of 0. Raises ValueError on shapes that are not these, RequestError where
        N does not fit the grid.
        """
        if tokens.ndim != 3 or tokens.shape[2] != self.width_in:
            raise ValueError(f"connector: tokens are {tuple(tokens.shape)}, expected [n, N, {self.width_in}]")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:2]):
            raise ValueError(
                f"connector: mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool {tuple(tokens.shape[:2])}"
            )
        self.count(tokens.shape[1])
        if not torch.compiler.is_exporting() and tokens.shape[0] == 0:
            # One made-up row, cut off again: every parameter has a gradient, as on ranks that have pictures.
            row = tokens.new_zeros(1, *tokens.shape[1:])
            out, kept = self(row, None if mask is None else mask.new_ones(1, mask.shape[1]))
            return out[:0], None if kept is None else kept[:0]
        if mask is not None:
            tokens = zero_where_masked(tokens, mask)
        out, kept = self.connect(tokens, mask)
        return (out if kept is None else zero_where_masked(out, kept)), kept

    def _check_grid(self, N: int) -> None:
        if self.grid is not None and self.grid[0] * self.grid[1] != N:
            rows, columns = self.grid
            raise RequestError(
                f"the connector got {N} tokens a picture, expected {rows} x {columns} = {rows * columns}",
                where="connector",
                remedy="the tower must drop its class token and other tokens that belong to no patch",
            )


def zero_where_masked(x: Tensor, mask: Tensor) -> Tensor:
    """x [n, N, C] with 0 where mask [n, N] is false; nothing of what stood there reaches a gradient."""
    return torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def any_valid(mask: Tensor | None, count: int) -> Tensor | None:
    """[n, count]: rows of `mask` [n, N] that have a valid token, for connectors whose every position reads the row."""
    return None if mask is None else mask.any(1, keepdim=True).expand(mask.shape[0], count)
