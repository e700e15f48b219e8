"""Steps before an MLP that make fewer positions of neighbouring tokens: pooling, pixel shuffle, concatenation.

n rows, H x W grid of tokens in raster order, N = H W tokens, C channels, f factor of a pixel shuffle.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from vlm.config.errors import RequestError
from vlm.config.options import Options
from vlm.connectors.base import Grid

Count = Annotated[int, Field(gt=0)]


class Pool2dOptions(Options):
    """Averages over windows that do not overlap (infmllm)."""

    kind: Literal["pool2d"] = "pool2d"
    grid: tuple[Count, Count] = Field(description="rows and columns that are left; each divides those of the tower")


class PixelShuffleOptions(Options):
    """The f x f tokens of a window, joined on channels (nvlm)."""

    kind: Literal["pixel-shuffle"] = "pixel-shuffle"
    factor: int = Field(2, ge=1, description="side f of the window")


class ConcatOptions(Options):
    """k successive tokens in raster order, joined on channels."""

    kind: Literal["concat"] = "concat"
    k: int = Field(4, ge=1, description="tokens that become one position")


Gathering = Annotated[Pool2dOptions | PixelShuffleOptions | ConcatOptions, Field(discriminator="kind")]


def window_of(options: Pool2dOptions | PixelShuffleOptions, grid: Grid | None) -> tuple[Grid, Grid]:
    """(grid that is left, window) in rows and columns.

    Raises RequestError where the window does not divide the grid: windows of unequal size would overlap or leave
    tokens out.
    """
    if grid is None:
        raise RequestError(
            f"{options.kind} needs tokens on a grid, and the tower gives none",
            where="connector.pre",
            remedy='use pre = "none" or concat, or a tower that gives patch tokens',
        )
    rows, columns = grid
    pools = isinstance(options, Pool2dOptions)
    down, across = options.grid if isinstance(options, Pool2dOptions) else (options.factor, options.factor)
    if rows % down or columns % across:
        raise RequestError(
            f"{options.kind} {'to' if pools else 'in windows of'} {down} x {across} does not divide the tower's "
            f"{rows} x {columns} tokens",
            where=f"connector.pre.{'grid' if pools else 'factor'}",
            remedy=f"choose divisors of {rows} and {columns}, or another picture or patch size",
        )
    other = (rows // down, columns // across)
    return ((down, across), other) if pools else (other, (down, across))


def windows(tokens: Tensor, left: Grid, window: Grid) -> Tensor:
    """[n, H W, C] -> [n, h w, window rows x window columns, C]: windows and what is in them in raster order."""
    n, _, c = tokens.shape
    x = tokens.reshape(n, left[0], window[0], left[1], window[1], c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(n, left[0] * left[1], window[0] * window[1], c)


def pool2d(tokens: Tensor, mask: Tensor | None, left: Grid, window: Grid) -> Tensor:
    """Mean of the valid tokens of each window: [n, H W, C] -> [n, h w, C]; masked tokens are 0 already.

    A window without a valid token gives 0.
    """
    x = windows(tokens, left, window)
    if mask is None:
        return x.mean(2)
    valid = windows(mask[..., None].to(tokens.dtype), left, window).sum(2)
    return x.sum(2) / valid.clamp(min=1)


def shuffle(tokens: Tensor, grid: Grid, factor: int) -> Tensor:
    """[n, H W, C] -> [n, H W / f^2, f^2 C]; channels of a window row by row, then column by column, as published
    checkpoints have them (nvlm)."""
    left = (grid[0] // factor, grid[1] // factor)
    n, c = tokens.shape[0], tokens.shape[2]
    return windows(tokens, left, (factor, factor)).reshape(n, left[0] * left[1], factor * factor * c)


def concat(tokens: Tensor, k: int) -> Tensor:
    """[n, N, C] -> [n, N / k, k C]"""
    n, count, c = tokens.shape
    return tokens.reshape(n, count // k, k * c)
