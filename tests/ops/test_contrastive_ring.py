"""Contrastive losses around a ring of ranks equal those of one rank, values and gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.training.communicators import ProcessGroup
from vlm.types import Communicator, SingleProcess

TOTAL, E = 37, 12


class Threads:
    """Ranks as threads of this process."""

    def __init__(self, size: int) -> None:
        self.size, self.slots, self.gate = size, [None] * size, threading.Barrier(size, timeout=60)

    def run(self, work: Callable[[Communicator], object]) -> list[object]:
        results: list[object] = [None] * self.size

        def body(rank: int) -> None:
            try:
                results[rank] = work(Member(self, rank))
            except BaseException as error:
                results[rank] = error
                self.gate.abort()

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results


class Member:
    def __init__(self, group: Threads, rank: int) -> None:
        self.group, self.rank, self.size = group, rank, group.size

    def exchange(self, value: object) -> list:
        self.group.slots[self.rank] = value  # type: ignore[call-overload]
        self.group.gate.wait()
        out = list(self.group.slots)
        self.group.gate.wait()
        return out

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.exchange(tensor.detach().clone())).sum(0)

    def gather_rows(self, tensor: Tensor) -> list[Tensor]:
        return self.exchange(tensor)

    def gather_numbers(self, numbers: list[int]) -> list[list[int]]:
        return self.exchange(list(numbers))

    def shift(self, tensor: Tensor, rows: int) -> Tensor:
        came = self.exchange(tensor.detach().clone())[(self.rank - 1) % self.size]
        assert came.shape[0] == rows
        return came

    def barrier(self) -> None:
        self.exchange(None)


def problem() -> dict[str, Tensor]:
    torch.manual_seed(0)
    unit = [F.normalize(torch.randn(TOTAL, width, dtype=torch.float64), dim=1) for width in (E, E, 5, 5)]
    return {"x": unit[0], "y": unit[1], "a": unit[2], "b": unit[3], "groups": torch.randint(0, 20, (TOTAL,)),
            "exclude": torch.randint(0, 9, (TOTAL,)), "weight": torch.rand(TOTAL, dtype=torch.float64)}


def loss_of(form: str, kind: str, part: dict[str, Tensor], leaves: list[Tensor], communicator: Communicator) -> Tensor:
    """The weighted sum of one rank's values."""
    x, y, s, b = leaves
    softmax = form == "softmax"
    options = {
        "plain": {},
        "groups": {"groups": part["groups"], "exclude": part["exclude"], "smoothing": 0.1 if softmax else 0.0},
        "teacher": {"teacher": ops.Teacher(part["a"].to(x), part["b"].to(x), scale=4.0, share=0.7), "decoupled": softmax},
    }[kind]
    rows, columns = ops.ring_contrastive(form, x, y, s, None if softmax else b, communicator, **options)  # type: ignore[arg-type]
    return (part["weight"].to(x) * (rows + 2 * columns)).sum()


def once(form: str, kind: str, whole: dict[str, Tensor], rows: slice, communicator: Communicator,
         dtype: torch.dtype) -> list[Tensor]:
    """This rank's loss and gradients."""
    part = {name: t[rows] for name, t in whole.items()}
    scalars = [torch.tensor(v, dtype=dtype) for v in (1.9, -1.0)]
    leaves = [t.to(dtype).requires_grad_() for t in (part["x"], part["y"], *scalars)]
    loss = loss_of(form, kind, part, leaves, communicator)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def cuts(size: int) -> list[slice]:
    """Uneven; with four ranks one of them holds nothing."""
    ends = {1: [TOTAL], 2: [10, TOTAL], 3: [5, 6, TOTAL], 4: [12, 12, 30, TOTAL]}[size]
    return [slice(start, stop) for start, stop in zip([0, *ends], ends)]


def joined(parts: list[list[Tensor]]) -> list[Tensor]:
    loss, x, y, s, b = zip(*parts)
    return [torch.stack(loss).sum(), torch.cat(x), torch.cat(y), torch.stack(s).sum(), torch.stack(b).sum()]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "groups", "teacher"])
@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_core_infonce_and_core_siglip_a_ring_of_ranks_equals_one_rank(form: str, kind: str, size: int, backend: ops.Backend) -> None:
    whole = problem()
    dtype, tolerance = (torch.float32, 2e-5) if backend == "native" else (torch.float64, 1e-11)
    with ops.backend("torch"):
        exact = once(form, kind, whole, slice(None), SingleProcess(), torch.float64)
    with ops.backend(backend):
        ranks = Threads(size).run(lambda c: once(form, kind, whole, cuts(size)[c.rank], c, dtype))
    for got, expected in zip(joined(ranks), exact):  # type: ignore[arg-type]
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("form", ["softmax", "sigmoid"])
def test_core_siglip_one_rank_is_the_operator_without_a_ring(form: str) -> None:
    whole = problem()
    x, y, s, b = whole["x"], whole["y"], torch.tensor(1.9, dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    around = ops.ring_contrastive(form, x, y, s, None if form == "softmax" else b, SingleProcess())  # type: ignore[arg-type]
    plain = ops.contrastive_softmax(x, y, s) if form == "softmax" else ops.contrastive_sigmoid(x, y, s, b)
    for got, expected in zip(around, plain):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def _member(rank: int, size: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=size)
    group = ProcessGroup()
    torch.save(once("softmax", "groups", problem(), cuts(size)[rank], group, torch.float32), f"{directory}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_a_ring_of_processes_equals_one_rank(tmp_path: Path) -> None:
    multiprocessing.spawn(_member, args=(2, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    exact = once("softmax", "groups", problem(), slice(None), SingleProcess(), torch.float64)
    for got, expected in zip(joined(parts), exact):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-4)


def test_wrong_arguments_are_named() -> None:
    x, s = torch.zeros(4, 3), torch.zeros(())
    with pytest.raises(ValueError, match="x and y must be"):
        ops.ring_contrastive("softmax", x, torch.zeros(5, 3), s, None, SingleProcess())
    with pytest.raises(ValueError, match="wants a bias"):
        ops.ring_contrastive("sigmoid", x, x, s, None, SingleProcess())
    with pytest.raises(ValueError, match="groups must be"):
        ops.ring_contrastive("softmax", x, x, s, None, SingleProcess(), groups=torch.zeros(3, dtype=torch.long))
