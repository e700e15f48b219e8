"""Conditions on which tokens meet, wherever they stand: documents, tags, padding, and pairs that are listed.

B batch, H query heads, N queries, M keys. Source: core-facet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm.ops.masks.atom import (
    Atom,
    Lowered,
    MaskShape,
    check_32_bits,
    check_batch,
    check_lengths,
    integers,
    key_mask_of,
    positive,
    set_fields,
)


@dataclass(frozen=True, eq=False)
class Segments(Atom):
    """Same id: packed documents, Swin's regions; with `shared`, keys of that id are seen by all (facets).

    query_ids [B | 1, N], key_ids [B | 1, M] (query_ids when none): integers. Source: core-facet for `shared`.
    """

    query_ids: Tensor
    key_ids: Tensor
    shared: int | None = None

    def __init__(self, query_ids: Tensor, key_ids: Tensor | None = None, shared: int | None = None) -> None:
        check_32_bits("Segments", shared or 0)
        set_fields(self, query_ids=integers("Segments", query_ids, 2), shared=shared,
             key_ids=integers("Segments", query_ids if key_ids is None else key_ids, 2))

    def allow(self, shape: MaskShape) -> Tensor:
        check_lengths("Segments", self.query_ids, self.key_ids, shape)
        same = self.query_ids[:, :, None] == self.key_ids[:, None, :]
        if self.shared is not None:
            same = same | (self.key_ids == self.shared)[:, None, :]
        return same[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        check_lengths("Segments", self.query_ids, self.key_ids, shape)
        return Lowered("ids", (int(self.shared is not None), self.shared or 0, 0, 0),
                       (self.query_ids, self.key_ids))


@dataclass(frozen=True, eq=False)
class TileTags(Atom):
    """NVLM's tags: a query with tag t > 0 sees the keys of tile t alone, one with tag 0 sees all.

    query_tags [B | 1, N], key_tiles [B | 1, M]: integers. Source: nvlm.
    """

    query_tags: Tensor
    key_tiles: Tensor

    def __init__(self, query_tags: Tensor, key_tiles: Tensor) -> None:
        set_fields(self, query_tags=integers("TileTags", query_tags, 2), key_tiles=integers("TileTags", key_tiles, 2))

    def allow(self, shape: MaskShape) -> Tensor:
        check_lengths("TileTags", self.query_tags, self.key_tiles, shape)
        same = self.query_tags[:, :, None] == self.key_tiles[:, None, :]
        return (same | (self.query_tags == 0)[:, :, None])[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        check_lengths("TileTags", self.query_tags, self.key_tiles, shape)
        return Lowered("ids", (0, 0, 1, 0), (self.query_tags, self.key_tiles))


@dataclass(frozen=True, eq=False)
class GlobalTokens(Atom):
    """Opens the local atoms of a program (windows, Lambda, block lists): global queries see all keys, and global keys are
    seen by all queries, as far as the other atoms (padding, causality, documents) allow.

    queries bool [B | 1, N], keys bool [B | 1, M] (queries when none). Source: budget-longformer.
    """

    queries: Tensor
    keys: Tensor

    def __init__(self, queries: Tensor, keys: Tensor | None = None) -> None:
        keys = queries if keys is None else keys
        for t in (queries, keys):
            if t.dtype != torch.bool or t.ndim != 2:
                raise ValueError(f"GlobalTokens wants bool [B, length], got {t.dtype} {tuple(t.shape)}")
        set_fields(self, queries=queries, keys=keys)

    def allow(self, shape: MaskShape) -> Tensor:
        """Pairs that the local atoms need not allow."""
        check_lengths("GlobalTokens", self.queries, self.keys, shape)
        return (self.queries[:, :, None] | self.keys[:, None, :])[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        check_lengths("GlobalTokens", self.queries, self.keys, shape)
        return Lowered("global", tensors=(self.queries, self.keys))


@dataclass(frozen=True, eq=False)
class KeyPadding(Atom):
    """Keys that exist. mask: bool [B, M], true = exists, or integer [B], the number of valid leading keys. What padded
    keys hold is never read."""

    mask: Tensor

    def of(self, shape: MaskShape) -> Tensor:
        """bool [B, M]."""
        return key_mask_of(self.mask, shape, "KeyPadding")

    def allow(self, shape: MaskShape) -> Tensor:
        return self.of(shape)[:, None, None, :]

    def lower(self, shape: MaskShape) -> None:
        return None


@dataclass(frozen=True, eq=False)
class Dense(Atom):
    """Any boolean [B | 1, H | 1, N | 1, M | 1]: the mask itself."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        if mask.dtype != torch.bool or mask.ndim != 4:
            raise ValueError(f"Dense wants bool [B, H, N, M], got {mask.dtype} {tuple(mask.shape)}")
        set_fields(self, mask=mask)

    def allow(self, shape: MaskShape) -> Tensor:
        full = (shape.batch, shape.heads, shape.queries, shape.keys)
        if any(n not in (1, want) for n, want in zip(self.mask.shape, full)):
            raise ValueError(f"Dense mask {tuple(self.mask.shape)} cannot be broadcast to {full}")
        return self.mask

    def lower(self, shape: MaskShape) -> None:
        return None


@dataclass(frozen=True, eq=False)
class BlockList(Atom):
    """Each block of queries sees the key blocks listed for it. Local.

    indices: integer [B | 1, H | 1, query blocks, slots], in any order; counts: integer [B | 1, H | 1, query blocks], how
    many leading slots are used.
    """

    indices: Tensor
    counts: Tensor
    query_block: int
    key_block: int
    local: ClassVar[bool] = True

    def __init__(self, indices: Tensor, counts: Tensor, query_block: int, key_block: int) -> None:
        if indices.shape[:3] != counts.shape:
            raise ValueError(f"BlockList: counts {tuple(counts.shape)} do not fit indices {tuple(indices.shape)}")
        set_fields(self, indices=integers("BlockList", indices, 4), counts=integers("BlockList", counts, 3),
             query_block=positive("BlockList", query_block), key_block=positive("BlockList", key_block))

    def _check(self, shape: MaskShape) -> None:
        blocks = (shape.queries + self.query_block - 1) // self.query_block
        b, h, n, _ = self.indices.shape
        if b not in (1, shape.batch) or h not in (1, shape.heads) or n < blocks:
            raise ValueError(f"BlockList: lists {tuple(self.indices.shape)} do not fit batch {shape.batch}, {shape.heads} "
                             f"heads, {blocks} blocks of queries")

    def allow(self, shape: MaskShape) -> Tensor:
        self._check(shape)
        b, h, n, slots = self.indices.shape
        blocks = (shape.keys + self.key_block - 1) // self.key_block
        used = torch.arange(slots, device=shape.device) < self.counts[..., None]
        where = torch.where(used, self.indices.long(), blocks)
        listed = torch.zeros(b, h, n, blocks + 1, dtype=torch.bool, device=shape.device).scatter(
            3, where, torch.ones_like(where, dtype=torch.bool))
        rows = torch.div(torch.arange(shape.queries, device=shape.device), self.query_block, rounding_mode="floor")
        columns = torch.div(torch.arange(shape.keys, device=shape.device), self.key_block, rounding_mode="floor")
        return listed[:, :, rows][..., columns]

    def lower(self, shape: MaskShape) -> Lowered:
        self._check(shape)
        _, _, n, slots = self.indices.shape
        return Lowered("blocks", (self.query_block, self.key_block, slots, n), (self.indices, self.counts))


@dataclass(frozen=True, eq=False)
class Rows(Atom):
    """Each query sees one range of keys. ranges: integer [B | 1, N, 2], first key and end."""

    ranges: Tensor

    def __init__(self, ranges: Tensor) -> None:
        set_fields(self, ranges=integers("Rows", ranges, 3))

    def allow(self, shape: MaskShape) -> Tensor:
        self._check(shape)
        j = torch.arange(shape.keys, device=shape.device)
        return ((j >= self.ranges[:, :, :1]) & (j < self.ranges[:, :, 1:]))[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        self._check(shape)
        return Lowered("rows", tensors=(self.ranges,))

    def _check(self, shape: MaskShape) -> None:
        check_batch("Rows", self.ranges, shape.batch)
        if self.ranges.shape[1] != shape.queries or self.ranges.shape[2] != 2:
            raise ValueError(f"Rows: ranges {tuple(self.ranges.shape)} do not fit {shape.queries} queries")
