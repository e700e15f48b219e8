"""What an atom of a mask is, and what its fields must be. B batch, H query heads, N queries, M keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlm.ops.backend import can_be_looked_at

_WIDE = (torch.int64, torch.uint32, torch.uint64)


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


def key_mask_of(mask: Tensor, shape: MaskShape, name: str = "attention: key_mask") -> Tensor:
    """bool [B, M] from itself or from integer lengths [B]; ValueError for anything else."""
    if mask.ndim == 1 and mask.shape[0] == shape.batch and not mask.is_floating_point() and mask.dtype != torch.bool:
        return torch.arange(shape.keys, device=shape.device)[None, :] < mask[:, None]
    if mask.dtype != torch.bool or mask.shape != (shape.batch, shape.keys):
        raise ValueError(f"{name} must be bool [{shape.batch}, {shape.keys}] or integer lengths [{shape.batch}], got "
                         f"{mask.dtype} {tuple(mask.shape)}")
    return mask


def set_fields(atom: object, **fields: object) -> None:
    """The fields of a frozen atom, and the check that follows them."""
    for name, value in fields.items():
        object.__setattr__(atom, name, value)
    check = getattr(atom, "__post_init__", None)
    if check is not None:
        check()


def positive(name: str, size: int) -> int:
    if size < 1:
        raise ValueError(f"{name}: size is {size}; expected 1 or more")
    return size


def integers(name: str, t: Tensor, axes: int) -> Tensor:
    if t.is_floating_point() or t.dtype == torch.bool or t.ndim != axes:
        raise ValueError(f"{name} wants integers with {axes} axes, got {t.dtype} {tuple(t.shape)}")
    if t.dtype in _WIDE and t.numel() and can_be_looked_at(t):
        low, high = t.to(torch.int64).aminmax()
        check_32_bits(name, int(low), int(high))
    return t


def check_32_bits(name: str, *numbers: int) -> None:
    """The kernels read 32 bits. Tensors are looked at where that is cheap: once an atom, on the CPU, outside of graphs."""
    for number in numbers:
        if not -(2**31) <= number < 2**31:
            raise ValueError(f"{name}: {number} does not fit 32 bits; number the ids anew (torch.unique(..., return_inverse=True))")


def check_batch(name: str, t: Tensor, batch: int) -> None:
    if t.shape[0] not in (1, batch):
        raise ValueError(f"{name}: {tuple(t.shape)} does not fit a batch of {batch}")


def check_lengths(name: str, queries: Tensor, keys: Tensor, shape: MaskShape) -> None:
    check_batch(name, queries, shape.batch)
    check_batch(name, keys, shape.batch)
    if queries.shape[1] != shape.queries or keys.shape[1] != shape.keys:
        raise ValueError(f"{name}: {tuple(queries.shape)} and {tuple(keys.shape)} do not fit {shape.queries} queries and "
                         f"{shape.keys} keys")
