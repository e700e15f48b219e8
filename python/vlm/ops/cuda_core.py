"""The compiled CUDA kernels: whether they are there, and what every call of them needs.

`vlm._native_cuda` is built with VLM_CUDA=ON (see docs/kernels/cuda.md) and looked for when the first CUDA tensor asks.
Kernels run in the current stream of the tensors' device. Nothing here has run on a GPU yet.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vlm.ops.backend import current_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def cuda_module() -> Any:
    """The compiled module, None where it was not built or torch sees no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        return importlib.import_module("vlm._native_cuda")
    except ImportError:
        return None


def cuda_takes(*tensors: Tensor | None) -> bool:
    """Whether the CUDA kernels compute this call: all tensors on one GPU, in float32 or a half precision.

    Never while a graph is exported, and not inside `backend("torch")`.
    """
    given = [t for t in tensors if t is not None]
    if not given or any(not t.is_cuda for t in given) or current_backend() == "torch" or torch.compiler.is_exporting():
        return False
    return len({t.device for t in given}) == 1 and all(t.dtype in _DTYPES for t in given) and cuda_module() is not None


@contextmanager
def launch_on(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """The module and the stream's address, with the tensor's device made current."""
    with torch.cuda.device(tensor.device):
        yield cuda_module(), torch.cuda.current_stream(tensor.device).cuda_stream


def readable(t: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def workspace(like: Tensor, size: int) -> Tensor:
    """At least `size` bytes beside `like`."""
    return like.new_empty(max(size, 1), dtype=torch.uint8)
