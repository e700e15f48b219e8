"""The communicator over torch.distributed (gloo on CPU, nccl on CUDA), and how a process joins its group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from vlm.types import Communicator, SingleProcess

TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer than this fails, so that a lost rank cannot hang a run for ever."""

PATIENCE = timedelta(days=1)
"""The same of a barrier: before it one rank may work alone, and long (a tokenizer, an evaluation, a report)."""


class ProcessGroup:
    """All ranks of the default group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self._patient = dist.new_group(timeout=PATIENCE)

    def sum(self, tensor: Tensor) -> Tensor:
        out = tensor.detach().clone()
        dist.all_reduce(out)
        return out

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        """Ranks may hold different numbers of rows; trailing sizes must agree."""
        counts = [numbers[0] for numbers in self.gather_numbers([tensor.shape[0]])]
        longest = max(counts)
        plain = tensor.detach().to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach()
        padded = plain.new_zeros((longest, *tensor.shape[1:]))
        padded[: tensor.shape[0]] = plain
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        out = [part[:count].to(tensor.dtype) for part, count in zip(parts, counts)]
        out[self.rank] = tensor
        return out

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        own = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(parts, own)
        return [part.tolist() for part in parts]

    def shift(self, tensor: Tensor, rows: int) -> Tensor:
        """Sending and receiving are posted together, so that no rank waits for another to begin."""
        own = tensor.detach().contiguous()
        came = own.new_empty((rows, *own.shape[1:]))
        to, source = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        posted = []
        if own.numel():
            posted.append(dist.P2POp(dist.isend, own, to))
        if came.numel():
            posted.append(dist.P2POp(dist.irecv, came, source))
        for request in dist.batch_isend_irecv(posted) if posted else []:
            request.wait()
        return came

    def barrier(self) -> None:
        dist.barrier(self._patient)


@contextmanager
def joined() -> Iterator[Communicator]:
    """This process's communicator: one process, or the group that RANK and WORLD_SIZE announce (torchrun, `-n`)."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield SingleProcess()
        return
    dist.init_process_group(
        "gloo",
        init_method=os.environ.get("VLM_RENDEZVOUS") or "env://",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=TIMEOUT,
    )
    group = ProcessGroup()
    yield group
    # Only after success: destroying a group that another rank has left can abort the process.
    group.barrier()
    dist.destroy_process_group()
