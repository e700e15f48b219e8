"""Communicator: the few collective calls that data, objectives and the trainer need.

One process is the identity; `training/distributed.py` implements it over torch.distributed; tests may run it over
threads. Ranks may hold different numbers of rows: `gather_rows` pads nothing away.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Communicator(Protocol):
    """rank in [0, size)."""

    rank: int
    size: int

    def sum(self, tensor: Tensor) -> Tensor:
        """Elementwise sum over ranks; every rank gets it. No gradient."""
        ...

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """Each rank's [n_r, ...] in rank order, n_r may differ; this rank's own entry is `tensor` itself."""
        ...

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        """Each rank's list of integers (each list of the same length) in rank order."""
        ...

    def shift(self, tensor: Tensor, rows: int) -> Tensor:
        """One step around the ring: the tensor goes to rank + 1, and that of rank - 1, [rows, ...], is returned. Types and
        trailing sizes must agree. No gradient."""
        ...

    def barrier(self) -> None:
        """Wait for all ranks."""
        ...


class SingleProcess:
    """The communicator of one process."""

    rank = 0
    size = 1

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        return [numbers]

    def shift(self, tensor: Tensor, rows: int) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return None
