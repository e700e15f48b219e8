"""Attention masks as programs: atoms that the native core turns into tiles to skip, and plain torch into booleans.

B batch, H query heads, N queries, M keys. `allow` is true where a query may attend. Query i has position i + offset, key
j position j; offset is M - N for alignment "bottom-right" and 0 for "top-left"; distance d = i + offset - j.
Source: core-exact-attention, core-facet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

Alignment = Literal["bottom-right", "top-left"]

_FAR = 2**30
_KINDS = {"band": 0, "local_band": 1, "block_causal": 2, "prefix": 3, "lambda": 4, "spans": 5, "ids": 6, "rows": 7,
          "global": 8, "dense": 9, "blocks": 10}


class MaskShape(NamedTuple):
    """What a mask is asked for: sizes of the scores, and where they are."""

    batch: int
    heads: int
    queries: int
    keys: int
    device: torch.device


class Lowered(NamedTuple):
    """One atom of the native core: kind, four numbers, and its arrays [B | 1, ...]; see vlm/mask.hpp."""

    kind: str
    numbers: tuple[int, int, int, int] = (0, 0, 0, 0)
    tensors: tuple[Tensor, ...] = ()


class LoweredMask(NamedTuple):
    """A program for the native operator: 12 integers for each atom (vlm/mask.hpp, with places in `arrays` instead of
    addresses), the small arrays one behind the other as int32, and the dense mask bool [B | 1, H | 1, N, M]."""

    code: list[int]
    arrays: Tensor | None
    dense: Tensor | None


@dataclass(frozen=True, eq=False)
class Atom:
    """One condition on pairs (query, key)."""

    local: ClassVar[bool] = False
    """Whether `GlobalTokens` opens it: it says which pairs are near, not which may never meet."""

    def allow(self, shape: MaskShape) -> Tensor:
        """Boolean [B | 1, H | 1, N, M], true where this atom lets the query attend."""
        raise NotImplementedError

    def lower(self, shape: MaskShape) -> Lowered | None:
        """The same for the native core; None for an atom that travels otherwise."""
        raise NotImplementedError


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
        _set(self, size=_positive("Window", size), causal=causal, alignment=alignment)

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
        _set(self, size=_positive("SymmetricWindow", size), alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        return (self.distance(shape).abs() <= self.size // 2)[None, None]

    def lower(self, shape: MaskShape) -> Lowered:
        return Lowered("local_band", (self.offset(shape), self.size // 2, self.size // 2, 0))


@dataclass(frozen=True, eq=False)
class BlockCausal(Positional):
    """Blocks of `size` positions: all keys of the query's own block and of those before it."""

    size: int = 0

    def __init__(self, size: int, alignment: Alignment = "bottom-right") -> None:
        _set(self, size=_positive("BlockCausal", size), alignment=alignment)

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
        _set(self, lengths=_integers("Prefix", lengths, 1), alignment=alignment)

    def allow(self, shape: MaskShape) -> Tensor:
        _batch("Prefix", self.lengths, shape.batch)
        prefix = torch.arange(shape.keys, device=shape.device) < self.lengths[:, None]
        return (prefix[:, None, :] | (self.distance(shape) >= 0))[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        _batch("Prefix", self.lengths, shape.batch)
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
        _set(self, window=_positive("Lambda", window), sinks=sinks, distance_cap=distance_cap, alignment=alignment)

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
        _set(self, query_ids=_integers("Spans", query_ids, 2), alignment=alignment,
             key_ids=_integers("Spans", query_ids if key_ids is None else key_ids, 2))

    def allow(self, shape: MaskShape) -> Tensor:
        _lengths("Spans", self.query_ids, self.key_ids, shape)
        same = (self.query_ids[:, :, None] == self.key_ids[:, None, :]) & (self.query_ids >= 0)[:, :, None]
        return (same | (self.distance(shape) >= 0))[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        _lengths("Spans", self.query_ids, self.key_ids, shape)
        return Lowered("spans", (self.offset(shape), 0, 0, 0), (self.query_ids, self.key_ids))


@dataclass(frozen=True, eq=False)
class Segments(Atom):
    """Same id: packed documents, Swin's regions; with `shared`, keys of that id are seen by all (facets).

    query_ids [B | 1, N], key_ids [B | 1, M] (query_ids when none): integers. Source: core-facet for `shared`.
    """

    query_ids: Tensor
    key_ids: Tensor
    shared: int | None = None

    def __init__(self, query_ids: Tensor, key_ids: Tensor | None = None, shared: int | None = None) -> None:
        _set(self, query_ids=_integers("Segments", query_ids, 2), shared=shared,
             key_ids=_integers("Segments", query_ids if key_ids is None else key_ids, 2))

    def allow(self, shape: MaskShape) -> Tensor:
        _lengths("Segments", self.query_ids, self.key_ids, shape)
        same = self.query_ids[:, :, None] == self.key_ids[:, None, :]
        if self.shared is not None:
            same = same | (self.key_ids == self.shared)[:, None, :]
        return same[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        _lengths("Segments", self.query_ids, self.key_ids, shape)
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
        _set(self, query_tags=_integers("TileTags", query_tags, 2), key_tiles=_integers("TileTags", key_tiles, 2))

    def allow(self, shape: MaskShape) -> Tensor:
        _lengths("TileTags", self.query_tags, self.key_tiles, shape)
        same = self.query_tags[:, :, None] == self.key_tiles[:, None, :]
        return (same | (self.query_tags == 0)[:, :, None])[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        _lengths("TileTags", self.query_tags, self.key_tiles, shape)
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
        _set(self, queries=queries, keys=keys)

    def allow(self, shape: MaskShape) -> Tensor:
        """Pairs that the local atoms need not allow."""
        _lengths("GlobalTokens", self.queries, self.keys, shape)
        return (self.queries[:, :, None] | self.keys[:, None, :])[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        _lengths("GlobalTokens", self.queries, self.keys, shape)
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
        _set(self, mask=mask)

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
        _set(self, indices=_integers("BlockList", indices, 4), counts=_integers("BlockList", counts, 3),
             query_block=_positive("BlockList", query_block), key_block=_positive("BlockList", key_block))

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
        _set(self, ranges=_integers("Rows", ranges, 3))

    def allow(self, shape: MaskShape) -> Tensor:
        self._check(shape)
        j = torch.arange(shape.keys, device=shape.device)
        return ((j >= self.ranges[:, :, :1]) & (j < self.ranges[:, :, 1:]))[:, None]

    def lower(self, shape: MaskShape) -> Lowered:
        self._check(shape)
        return Lowered("rows", tensors=(self.ranges,))

    def _check(self, shape: MaskShape) -> None:
        _batch("Rows", self.ranges, shape.batch)
        if self.ranges.shape[1] != shape.queries or self.ranges.shape[2] != 2:
            raise ValueError(f"Rows: ranges {tuple(self.ranges.shape)} do not fit {shape.queries} queries")


@dataclass(frozen=True, eq=False)
class MaskProgram:
    """The intersection of its atoms, `GlobalTokens` opening the local ones."""

    atoms: tuple[Atom, ...] = ()

    def __init__(self, *atoms: Atom | MaskProgram) -> None:
        flat: list[Atom] = []
        for atom in atoms:
            flat.extend(atom.atoms if isinstance(atom, MaskProgram) else (atom,))
        _set(self, atoms=tuple(flat))

    def __and__(self, other: Atom | MaskProgram) -> MaskProgram:
        return MaskProgram(self, other)

    def __iter__(self) -> Iterator[Atom]:
        return iter(self.atoms)

    def key_mask(self, shape: MaskShape) -> Tensor | None:
        """bool [B, M]: the keys that exist, None when all do."""
        found: Tensor | None = None
        for atom in self.atoms:
            if isinstance(atom, KeyPadding):
                found = atom.of(shape) if found is None else found & atom.of(shape)
        return found

    def allow(self, shape: MaskShape) -> Tensor | None:
        """Boolean [B | 1, H | 1, N, M], or None when there is no atom."""
        opened: Tensor | None = None
        for atom in self.atoms:
            if isinstance(atom, GlobalTokens):
                opened = atom.allow(shape) if opened is None else opened | atom.allow(shape)
        whole: Tensor | None = None
        for atom in self.atoms:
            if isinstance(atom, GlobalTokens):
                continue
            part = atom.allow(shape)
            if atom.local and opened is not None:
                part = part | opened
            whole = part if whole is None else whole & part
        return whole

    def lower(self, shape: MaskShape) -> LoweredMask:
        """All atoms but the padding, for the native operator."""
        code: list[int] = []
        arrays: list[Tensor] = []
        dense: Tensor | None = None
        used = 0
        for atom in self._one_global():
            if isinstance(atom, Dense):
                dense = atom.allow(shape) if dense is None else dense & atom.allow(shape)
                continue
            lowered = atom.lower(shape)
            if lowered is None:
                continue
            row = [_KINDS[lowered.kind], *lowered.numbers, *(0,) * 7]
            for place, t in zip((5, 9), lowered.tensors):
                row[place] = used
                row[place + 1] = 0 if t.shape[0] == 1 else math.prod(t.shape[1:])
                if lowered.kind == "blocks":
                    row[place + 2] = 0 if t.shape[1] == 1 else math.prod(t.shape[2:])
                arrays.append(t.to(torch.int32).flatten())
                used += t.numel()
            code += row
        if dense is not None:
            if dense.shape[3] != shape.keys or dense.stride(3) != 1:
                dense = dense.expand(-1, -1, -1, shape.keys).contiguous()
            dense = dense.expand(-1, -1, shape.queries, -1)
        return LoweredMask(code, torch.cat(arrays) if arrays else None, dense)

    def _one_global(self) -> Sequence[Atom]:
        opened = [atom for atom in self.atoms if isinstance(atom, GlobalTokens)]
        if len(opened) < 2:
            return self.atoms
        queries, keys = opened[0].queries, opened[0].keys
        for atom in opened[1:]:
            queries, keys = queries | atom.queries, keys | atom.keys
        return [*(atom for atom in self.atoms if not isinstance(atom, GlobalTokens)), GlobalTokens(queries, keys)]


def key_mask_of(mask: Tensor, shape: MaskShape, name: str = "attention: key_mask") -> Tensor:
    """bool [B, M] from itself or from integer lengths [B]; ValueError for anything else."""
    if mask.ndim == 1 and mask.shape[0] == shape.batch and not mask.is_floating_point() and mask.dtype != torch.bool:
        return torch.arange(shape.keys, device=shape.device)[None, :] < mask[:, None]
    if mask.dtype != torch.bool or mask.shape != (shape.batch, shape.keys):
        raise ValueError(f"{name} must be bool [{shape.batch}, {shape.keys}] or integer lengths [{shape.batch}], got "
                         f"{mask.dtype} {tuple(mask.shape)}")
    return mask


def _set(atom: object, **fields: object) -> None:
    for name, value in fields.items():
        object.__setattr__(atom, name, value)
    if isinstance(atom, Positional):
        atom.__post_init__()


def _positive(name: str, size: int) -> int:
    if size < 1:
        raise ValueError(f"{name}: size is {size}; expected 1 or more")
    return size


def _integers(name: str, t: Tensor, axes: int) -> Tensor:
    if t.is_floating_point() or t.dtype == torch.bool or t.ndim != axes:
        raise ValueError(f"{name} wants integers with {axes} axes, got {t.dtype} {tuple(t.shape)}")
    return t


def _batch(name: str, t: Tensor, batch: int) -> None:
    if t.shape[0] not in (1, batch):
        raise ValueError(f"{name}: {tuple(t.shape)} does not fit a batch of {batch}")


def _lengths(name: str, queries: Tensor, keys: Tensor, shape: MaskShape) -> None:
    _batch(name, queries, shape.batch)
    _batch(name, keys, shape.batch)
    if queries.shape[1] != shape.queries or keys.shape[1] != shape.keys:
        raise ValueError(f"{name}: {tuple(queries.shape)} and {tuple(keys.shape)} do not fit {shape.queries} queries and "
                         f"{shape.keys} keys")
