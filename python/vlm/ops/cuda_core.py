"""The compiled CUDA kernels: whether they are there, which tensors they serve, and what every call of them needs.

`vlm._native_cuda` is built with VLM_CUDA=ON, see docs/kernels/cuda.md. It loads without a driver, so it is looked for at import.
Nothing of it has run on a GPU yet. Tests put the same module, built over an emulation, in its place.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CudaKernels:
    """A compiled module, and the type of the devices whose tensors it takes."""

    module: Any
    device_type: str


def installed_cuda_kernels() -> CudaKernels | None:
    """`vlm._native_cuda`, None where it was not built."""
    try:
        module = importlib.import_module("vlm._native_cuda")
    except ImportError:  # not built, as in the wheel; `vlm doctor` says so
        return None
    return CudaKernels(module, module.device_type)


_kernels: CudaKernels | None = installed_cuda_kernels()


@contextmanager
def cuda_kernels(module: Any) -> Iterator[None]:
    """Within the block `module` serves in place of `vlm._native_cuda`, for tensors of the device type that it names itself.

    For tests: over the emulation it names the CPU, and tensors of the CPU go every way that those of a GPU go. The switch
    is process-wide, not per thread.
    """
    global _kernels
    previous, _kernels = _kernels, CudaKernels(module, module.device_type)
    try:
        yield
    finally:
        _kernels = previous


def cuda_kernels_of(t: Tensor) -> CudaKernels | None:
    """What serves this tensor, None where nothing compiled for a GPU does: on other devices, and on GPUs before sm_80."""
    if _kernels is None or t.device.type != _kernels.device_type:
        return None
    return _kernels if t.device.type != "cuda" or _runs_on(t.device.index or 0) else None


@torch.compiler.assume_constant_result
def _runs_on(index: int) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(index) >= (8, 0)


@torch.compiler.assume_constant_result
def block_fits(query: str, sizes: tuple[int, ...] | int, index: int) -> bool:
    """Whether blocks on device `index` may ask for the shared memory that the module's `query` names for these sizes."""
    return _kernels is not None and _block_fits(_kernels, query, sizes, index)


@functools.cache
def _block_fits(kernels: CudaKernels, query: str, sizes: tuple[int, ...] | int, index: int) -> bool:
    return bool(getattr(kernels.module, query)(sizes) <= kernels.module.device_shared_bytes(index))


@contextmanager
def on_device_of(t: Tensor) -> Iterator[int]:
    """The address of the current stream of the tensor's device, which is made current."""
    if t.device.type != "cuda":  # emulated: there are no streams
        yield 0
        return
    with torch.cuda.device(t.device):
        yield torch.cuda.current_stream(t.device).cuda_stream


def workspace(like: Tensor, size: int) -> Tensor:
    """At least `size` bytes beside `like`."""
    return like.new_empty(max(size, 1), dtype=torch.uint8)
