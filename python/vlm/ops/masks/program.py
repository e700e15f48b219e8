"""Atoms put together: booleans for plain torch, twelve integers an atom for the native core.

B batch, H query heads, N queries, M keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.ops.masks.atom import Atom, MaskShape, set_fields
from vlm.ops.masks.tokens import Dense, GlobalTokens, KeyPadding

_KINDS = {"band": 0, "local_band": 1, "block_causal": 2, "prefix": 3, "lambda": 4, "spans": 5, "ids": 6, "rows": 7,
          "global": 8, "dense": 9, "blocks": 10}


class LoweredMask(NamedTuple):
    """A program for the native operator: 12 integers for each atom (vlm/mask.hpp, with places in `arrays` instead of
    addresses), the small arrays one behind the other as int32, and the dense mask bool [B | 1, H | 1, N, M]."""

    code: list[int]
    arrays: Tensor | None
    dense: Tensor | None


@dataclass(frozen=True, eq=False)
class MaskProgram:
    """The intersection of its atoms, `GlobalTokens` opening the local ones."""

    atoms: tuple[Atom, ...] = ()

    def __init__(self, *atoms: Atom | MaskProgram) -> None:
        flat: list[Atom] = []
        for atom in atoms:
            flat.extend(atom.atoms if isinstance(atom, MaskProgram) else (atom,))
        set_fields(self, atoms=tuple(flat))

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
