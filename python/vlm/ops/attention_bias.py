"""Position biases of attention that need no [N, M] tensor: numbers by relative position, differentiable in them.

H heads, N queries, M keys; position of query i is i + M - N (bottom-right), of key j it is j; d is their distance.
Each bias can be lowered to a small `relative` tensor for the native core, or written out for plain torch.
Source: core-exact-attention, swin-v2, lm-infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.ops.masks import Alignment, MaskShape


class Relative(NamedTuple):
    """What the native core adds: values [H | 1, L] by relative position; see vlm/attention.hpp. grid = (rows, columns),
    (0, 0) for a line, whose values stand at N - 1 - i + j."""

    values: Tensor
    grid: tuple[int, int] = (0, 0)


@dataclass(frozen=True, eq=False)
class Bias:
    """A bias that is a function of positions."""

    def relative(self, shape: MaskShape) -> Relative:
        raise NotImplementedError

    def dense(self, shape: MaskShape) -> Tensor:
        """[1, H | 1, N, M]."""
        i = torch.arange(shape.queries, device=shape.device)[:, None]
        j = torch.arange(shape.keys, device=shape.device)[None, :]
        return self.relative(shape).values[:, shape.queries - 1 - i + j][None]

    def _distance(self, shape: MaskShape, alignment: Alignment) -> Tensor:
        """d of each relative position, [N + M - 1]: N - 1 + offset first, 1 - M + offset last."""
        offset = shape.keys - shape.queries if alignment == "bottom-right" else 0
        return shape.queries + offset - torch.arange(shape.queries + shape.keys, device=shape.device)[1:]  # nothing at all has none


@dataclass(frozen=True, eq=False)
class Alibi(Bias):
    """-slope_h * min(|d|, cap). slopes [H], differentiable. Source: lm-infinite for the cap."""

    slopes: Tensor
    cap: int | None = None
    alignment: Alignment = "bottom-right"

    def relative(self, shape: MaskShape) -> Relative:
        _heads("Alibi", self.slopes, shape)
        d = self._distance(shape, self.alignment).abs()
        if self.cap is not None:
            d = d.clamp(max=self.cap)
        return Relative(-self.slopes[:, None] * d.to(self.slopes.dtype))


@dataclass(frozen=True, eq=False)
class BucketBias(Bias):
    """T5's table: one number for each bucket of distances, near ones a bucket each, far ones in logarithmic steps.

    table [buckets, H], differentiable. bidirectional: half of the buckets for keys behind the query (j > i), half for
    those before; otherwise keys behind share the bucket of distance 0.
    """

    table: Tensor
    bidirectional: bool = True
    max_distance: int = 128
    alignment: Alignment = "bottom-right"

    def buckets(self, d: Tensor) -> Tensor:
        """The bucket of each distance d = query - key."""
        count = self.table.shape[0]
        first = torch.zeros_like(d)
        if self.bidirectional:
            count //= 2
            first = (d < 0).to(d.dtype) * count
            d = d.abs()
        else:
            d = d.clamp(min=0)
        near = count // 2
        steps = torch.log(d.clamp(min=1).float() / near) / torch.log(torch.tensor(self.max_distance / near))
        far = (near + (steps * (count - near)).to(d.dtype)).clamp(max=count - 1)
        return first + torch.where(d < near, d, far)

    def relative(self, shape: MaskShape) -> Relative:
        _heads("BucketBias", self.table[0], shape)
        return Relative(self.table[self.buckets(self._distance(shape, self.alignment))].T)


@dataclass(frozen=True, eq=False)
class GridBias(Bias):
    """Swin's table: tokens lie row by row on a grid of `rows` x `columns`; one number for each offset (dy, dx), query
    minus key.

    table [(2 rows - 1)(2 columns - 1), H], at (dy + rows - 1)(2 columns - 1) + dx + columns - 1; differentiable.
    Queries and keys are the same tokens, N = M = rows * columns. Source: swin-v2.
    """

    table: Tensor
    rows: int
    columns: int

    def _check(self, shape: MaskShape) -> None:
        _heads("GridBias", self.table[0], shape)
        if self.table.shape[0] != (2 * self.rows - 1) * (2 * self.columns - 1):
            raise ValueError(f"GridBias: a grid of {self.rows} x {self.columns} wants a table of "
                             f"{(2 * self.rows - 1) * (2 * self.columns - 1)} rows, got {self.table.shape[0]}")
        if shape.queries != self.rows * self.columns or shape.keys != shape.queries:
            raise ValueError(f"GridBias: {shape.queries} queries and {shape.keys} keys are not a grid of {self.rows} x "
                             f"{self.columns}")

    def relative(self, shape: MaskShape) -> Relative:
        self._check(shape)
        return Relative(self.table.flip(0).T, (self.rows, self.columns))  # the core counts key minus query

    def dense(self, shape: MaskShape) -> Tensor:
        self._check(shape)
        y = torch.arange(self.rows, device=shape.device).repeat_interleave(self.columns)
        x = torch.arange(self.columns, device=shape.device).repeat(self.rows)
        row = y[:, None] - y[None, :] + self.rows - 1
        index = row * (2 * self.columns - 1) + x[:, None] - x[None, :] + self.columns - 1
        return self.table[index].permute(2, 0, 1)[None]

    @property
    def small(self) -> bool:
        """Whether writing the bias out, once for all windows, is cheaper than looking it up in every one."""
        return self.rows * self.columns <= 256


@dataclass(frozen=True, eq=False)
class KeyBias:
    """One number for each key, as log-sizes of merged tokens. values [B | 1, M] or [B | 1, H | 1, M]; differentiable."""

    values: Tensor

    def dense(self, shape: MaskShape) -> Tensor:
        """[B | 1, H | 1, 1, M]: broadcast over queries, so it costs nothing to write out."""
        values = self.values[:, None] if self.values.ndim == 2 else self.values
        if values.ndim != 3 or values.shape[0] not in (1, shape.batch) or values.shape[1] not in (1, shape.heads) \
                or values.shape[2] != shape.keys:
            raise ValueError(f"KeyBias: {tuple(self.values.shape)} does not fit batch {shape.batch}, {shape.heads} heads, "
                             f"{shape.keys} keys")
        return values[:, :, None, :]


AnyBias = Tensor | Bias | KeyBias


def narrowed(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """The bias in another type. A finite number that the type cannot hold becomes its lowest: only -inf removes a pair."""
    lowest = torch.finfo(dtype).min
    if torch.finfo(bias.dtype).min >= lowest:
        return bias.to(dtype)
    return torch.where(bias == -torch.inf, bias, bias.clamp(min=lowest)).to(dtype)


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of ALiBi: a geometric series from 2^(-8/H), float32 [H]; for other counts than powers of two, the
    series of the next lower one filled up with every second number of the next higher one."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (h + 1) / whole) for h in range(whole)]
    slopes += [2.0 ** (-8.0 * (2 * h + 1) / (2 * whole)) for h in range(heads - whole)]
    return torch.tensor(slopes)


def written_out(bias: AnyBias | None, shape: MaskShape) -> Tensor | None:
    """[B | 1, H | 1, N | 1, M | 1] for plain torch."""
    return bias if bias is None or isinstance(bias, Tensor) else bias.dense(shape)


def lowered(bias: AnyBias | None, shape: MaskShape, grids: bool = True) -> tuple[Tensor | None, Relative | None]:
    """(bias pair by pair, bias by relative position) for compiled kernels. grids: whether they take tables on a grid."""
    if bias is None or isinstance(bias, Tensor):
        return bias, None
    if isinstance(bias, KeyBias) or (isinstance(bias, GridBias) and (bias.small or not grids)):
        return bias.dense(shape), None
    return None, bias.relative(shape)


def _heads(name: str, t: Tensor, shape: MaskShape) -> None:
    if t.ndim != 1 or t.shape[0] not in (1, shape.heads):
        raise ValueError(f"{name}: one number for each of {shape.heads} heads wanted, got {tuple(t.shape)}")
