"""Where an operator computes: the module beside its tensors, and the arguments that say where. For the bodies of operators."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.ops.backend import core
from vlm.ops.cuda_core import cuda_kernels_of, on_device_of


class Launch(NamedTuple):
    """module: the native core or the CUDA kernels, whose calls have the same names and arguments but for `place`: the threads
    of the one, the stream of the other. cuda: which of the two."""

    module: Any
    place: dict[str, int]
    cuda: bool


@contextmanager
def launch_on(t: Tensor) -> Iterator[Launch]:
    """What computes beside this tensor; RuntimeError where nothing compiled does."""
    kernels = cuda_kernels_of(t)
    if kernels is not None:
        with on_device_of(t) as stream:
            yield Launch(kernels.module, {"stream": stream}, True)
    elif t.device.type == "cpu":
        yield Launch(core(), {"threads": torch.get_num_threads()}, False)
    else:
        raise RuntimeError(f"no compiled kernels for tensors on {t.device}: build with VLM_CUDA=ON (docs/kernels/cuda.md)")


def readable(t: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def view(t: Tensor) -> tuple[int, int, int, int]:
    """Address and strides of the first three of four axes."""
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def address(t: Tensor | None) -> int:
    """0 for what is not given."""
    return 0 if t is None else t.data_ptr()
