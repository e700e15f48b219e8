"""Conditions on where query and key stand: windows, blocks, prefixes, spans.

B batch, H query heads, N queries, M keys. Query i has position i + offset, key j position j; offset is M - N for alignment
"bottom-right" and 0 for "top-left"; distance d = i + offset - j.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlm.ops.masks.atom import (
    Atom,
    Lowered,
    MaskShape,
    check_batch,
    check_lengths,
    integers,
    positive,
    set_fields,
)

Alignment = Literal["bottom-right", "top-left"]

_FAR = 2**30


@dataclass(frozen=True, eq=False)
class Positional(Atom):
    """An atom that looks at the distance between query and key."""

    alignment: Alignment = "bottom-right"

    def __post_init__(self) -> None:
        if self.alignment not in ("bottom-right", "top-left"):
            raise ValueError(f"{type(self).__name__}: alignment is {self.alignment!r}; expected 'bottom-right' or 'top-left'")

    def offset(self, shape: MaskShape) -> int:
        return shape.keys - shape.queries if self.alignment == "bottom-right" else 0

    def distance(self, shape: MaskShape) -> Tensor:
        """d [N, M]."""
        i = torch.arange(shape.queries, device=shape.device)[:, None]
        return i + self.offset(shape) - torch.arange(shape.keys, device=shape.device)[None, :]


@dataclass(frozen=True, eq=False)
class Causal(Positional):
    """d >= 0."""

    def allow(self, shape: MaskShape) -> Tensor:
        return (self.distance(shape) >= 0)[None, None]

    def lower(self, shape: MaskShape) -> Lowered:
        return Lowered("band", (self.offset(shape), _FAR, 0, 0))


@dataclass(frozen=True, eq=False)
class Window(Positional):
    """0 <= d < size, or with `causal=False` -size < d < size. Local."""

    size: int = 0
    causal: bool = True
    local: ClassVar[bool] = True

    def __init__(self, size: int, causal: bool = True, alignment: Alignment = "bottom-right") -> None:
        set_fields(self, size=positive("Window", size), causal=causal, alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        d = self.distance(shape)
        return ((d < self.size) & (d >= 0 if self.causal else d > -self.size))[None, None]

    def lower(self, shape: MaskShape) -> Lowered:
        return Lowered("local_band", (self.offset(shape), self.size - 1, 0 if self.causal else self.size - 1, 0))


@dataclass(frozen=True, eq=False)
class SymmetricWindow(Positional):
    """|d| <= size // 2: `size` counts both sides. Local."""

    size: int = 0
    local: ClassVar[bool] = True

    def __init__(self, size: int, alignment: Alignment = "bottom-right") -> None:
        set_fields(self, size=positive("SymmetricWindow", size), alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        return (self.distance(shape).abs() <= self.size // 2)[None, None]

    def lower(self, shape: MaskShape) -> Lowered:
        return Lowered("local_band", (self.offset(shape), self.size // 2, self.size // 2, 0))


@dataclass(frozen=True, eq=False)
class BlockCausal(Positional):
    """Blocks of `size` positions: all keys of the query's own block and of those before it."""

    size: int = 0

    def __init__(self, size: int, alignment: Alignment = "bottom-right") -> None:
        set_fields(self, size=positive("BlockCausal", size), alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        position = torch.arange(shape.queries, device=shape.device) + self.offset(shape)
        ahead = torch.div(position, self.size, rounding_mode="floor")[:, None]
        return (ahead >= torch.div(torch.arange(shape.keys, device=shape.device), self.size, rounding_mode="floor"))[None, None]

    def lower(self, shape: MaskShape) -> Lowered:
        return Lowered("block_causal", (self.offset(shape), self.size, 0, 0))


@dataclass(frozen=True, eq=False)
class Prefix(Positional):
    """Causal, but the first `lengths[b]` keys are seen by all. lengths: integer [B]."""

    lengths: Tensor = None  # type: ignore[assignment]

    def __init__(self, lengths: Tensor, alignment: Alignment = "bottom-right") -> None:
        set_fields(self, lengths=integers("Prefix", lengths, 1), alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        check_batch("Prefix", self.lengths, shape.batch)
        prefix = torch.arange(shape.keys, device=shape.device) < self.lengths[:, None]
        return (prefix[:, None, :] | (self.distance(shape) >= 0))[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        check_batch("Prefix", self.lengths, shape.batch)
        return Lowered("prefix", (self.offset(shape), 0, 0, 0), (self.lengths,))


@dataclass(frozen=True, eq=False)
class Lambda(Positional):
    """LM-Infinite's shape: 0 <= d < window, or j < sinks with d >= 0. Local.

    `distance_cap` is no condition: it is what the position bias goes by (`Alibi.cap`), kept here for the reader.
    Source: lm-infinite.
    """

    window: int = 0
    sinks: int = 0
    distance_cap: int | None = None
    local: ClassVar[bool] = True

    def __init__(self, window: int, sinks: int = 0, distance_cap: int | None = None,
                 alignment: Alignment = "bottom-right") -> None:
        if sinks < 0:
            raise ValueError(f"Lambda: sinks is {sinks}; expected 0 or more")
        set_fields(self, window=positive("Lambda", window), sinks=sinks, distance_cap=distance_cap, alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        d = self.distance(shape)
        sink = torch.arange(shape.keys, device=shape.device) < self.sinks
        return ((d >= 0) & ((d < self.window) | sink))[None, None]

    def lower(self, shape: MaskShape) -> Lowered:
        return Lowered("lambda", (self.offset(shape), self.window, self.sinks, 0))


@dataclass(frozen=True, eq=False)
class Spans(Positional):
    """Causal, but tokens of one span see each other both ways (images in a causal text).

    query_ids [B | 1, N], key_ids [B | 1, M] (query_ids when none): integers, negative = in no span.
    """

    query_ids: Tensor = None  # type: ignore[assignment]
    key_ids: Tensor = None  # type: ignore[assignment]

    def __init__(self, query_ids: Tensor, key_ids: Tensor | None = None, alignment: Alignment = "bottom-right") -> None:
        set_fields(self, query_ids=integers("Spans", query_ids, 2), alignment=alignment,
             key_ids=integers("Spans", query_ids if key_ids is None else key_ids, 2))

    def allow(self, shape: MaskShape) -> Tensor:
        check_lengths("Spans", self.query_ids, self.key_ids, shape)
        same = (self.query_ids[:, :, None] == self.key_ids[:, None, :]) & (self.query_ids >= 0)[:, :, None]
        return (same | (self.distance(shape) >= 0))[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        check_lengths("Spans", self.query_ids, self.key_ids, shape)
        return Lowered("spans", (self.offset(shape), 0, 0, 0), (self.query_ids, self.key_ids))
