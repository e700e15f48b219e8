"""An MLP on visual tokens, after an optional step that makes fewer positions of them. Sources: infmllm, nvlm.

n rows, N tokens on a grid H x W, d_v width of the tower, K positions, d width of the language model.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.connectors.base import Connector, ConnectorBase, Grid
from vlm.connectors.gathering import (
    ConcatOptions,
    Gathering,
    Pool2dOptions,
    concat,
    pool2d,
    shuffle,
    window_of,
    windows,
)
from vlm.layers import Activation, NormKind, activation_of, norm_of


class MlpOptions(ConnectorBase):
    """`depth` linear layers with an activation between each two."""

    kind: Literal["mlp"] = "mlp"
    depth: int = Field(2, ge=1, description="number of linear layers; 1: no activation")
    hidden: int | None = Field(None, gt=0, description="channels between the layers; default: the language model's width")
    activation: Activation = "gelu"
    bias: bool = Field(True, description="biases of the layers")
    norm: NormKind | None = Field(None, description="norm of the tokens; none: no norm")
    norm_at: Literal["tokens", "input", "output"] = Field(
        "input", description="tokens: before `pre`; input: between `pre` and the first layer; output: after the last"
    )
    norm_eps: float = Field(1e-5, gt=0)
    pre: Gathering | None = Field(None, description="step before the layers: pool2d, pixel-shuffle, concat or none")

    def build(self, width_in: int, width_out: int, grid: Grid | None) -> MlpConnector:
        return MlpConnector(self, width_in, width_out, grid)


class MlpConnector(Connector):
    """Step, then layers. A position is valid where any of its tokens is; the mean of a pool counts valid ones only."""

    def __init__(self, options: MlpOptions, width_in: int, width_out: int, grid: Grid | None) -> None:
        super().__init__(width_in, width_out, grid)
        pre = self.pre = options.pre
        self.left: Grid | None = None
        self.window: Grid | None = None
        width = width_in
        if isinstance(pre, ConcatOptions):
            width *= pre.k
            if grid is not None:
                self.count(grid[0] * grid[1])
        elif pre is not None:
            self.left, self.window = window_of(pre, grid)
            width *= 1 if isinstance(pre, Pool2dOptions) else pre.factor**2
        self.norm_at = options.norm_at
        normed = {"tokens": width_in, "input": width, "output": width_out}[options.norm_at]
        self.norm = None if options.norm is None else norm_of(options.norm, normed, options.norm_eps)
        hidden = options.hidden or width_out
        widths = [width, *[hidden] * (options.depth - 1), width_out]
        self.linears = nn.ModuleList(nn.Linear(a, b, bias=options.bias) for a, b in pairwise(widths))
        self.activation = activation_of(options.activation)

    def count(self, N: int) -> int:
        self._check_grid(N)
        if self.left is not None:
            return self.left[0] * self.left[1]
        if isinstance(self.pre, ConcatOptions):
            if N % self.pre.k:
                raise RequestError(
                    f"concat of {self.pre.k} tokens does not divide the tower's {N} tokens",
                    where="connector.pre.k",
                    remedy=f"choose a divisor of {N}",
                )
            return N // self.pre.k
        return N

    def connect(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        x = self._normed(tokens, "tokens")
        if mask is not None and self.norm is not None and self.norm_at == "tokens":
            # A layer norm's bias moves the zeros of masked tokens; the step below counts on them.
            x = torch.where(mask[..., None], x, torch.zeros((), dtype=x.dtype, device=x.device))
        x = self._normed(self._gathered(x, mask), "input")
        for number, linear in enumerate(self.linears):
            x = linear(x if number == 0 else self.activation(x))
        return self._normed(x, "output"), self._kept(mask)

    def _normed(self, x: Tensor, at: str) -> Tensor:
        return self.norm(x) if self.norm is not None and self.norm_at == at else x

    def _gathered(self, x: Tensor, mask: Tensor | None) -> Tensor:
        pre = self.pre
        if pre is None:
            return x
        if isinstance(pre, ConcatOptions):
            return concat(x, pre.k)
        assert self.grid is not None
        assert self.left is not None
        assert self.window is not None
        if isinstance(pre, Pool2dOptions):
            return pool2d(x, mask, self.left, self.window)
        return shuffle(x, self.grid, pre.factor)

    def _kept(self, mask: Tensor | None) -> Tensor | None:
        """[n, N] -> [n, K]"""
        if mask is None or self.pre is None:
            return mask
        if isinstance(self.pre, ConcatOptions):
            return concat(mask[..., None], self.pre.k).any(-1)
        assert self.left is not None
        assert self.window is not None
        return windows(mask[..., None], self.left, self.window)[..., 0].any(-1)
