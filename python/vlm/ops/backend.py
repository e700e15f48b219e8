"""Which implementation an operator uses: compiled kernels (the native core, or those of a GPU) or its plain-torch twin.

The choice is made per call from three facts: the override below, the tensors (the native core takes float32 on the
CPU, some operators bfloat16; other half precision is converted; everything else goes to the twin), and whether the
graph is being exported (the twin is made of exportable operators). Tensors of a GPU are taken where the CUDA kernels were
built and the operator has one for the call. Which compiled modules are there is resolved once, at import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vlm.ops.cuda_core import cuda_kernels_of

try:
    _native: Any = importlib.import_module("vlm._native")
except ImportError:  # a source tree that was never built; `vlm doctor` reports it
    _native = None

Backend = Literal["auto", "native", "torch"]
NATIVE_AVAILABLE: bool = _native is not None and hasattr(_native, "attention_forward")
_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_override: Backend = "auto"


def core() -> Any:
    """The compiled module; RuntimeError with the remedy where it is missing."""
    if _native is None:
        raise RuntimeError("the compiled module vlm._native is missing: install the package (pip install -e .)")
    return _native


def current_backend() -> Backend:
    """The override in force: `auto` unless inside `backend(...)`."""
    return _override


@contextmanager
def backend(name: Backend) -> Iterator[None]:
    """Within the block every operator uses `name`; meant for tests and measurements.

    `native` raises if the tensors cannot be taken by compiled kernels, instead of falling back quietly.
    The switch is process-wide, not per thread.
    """
    global _override
    if name not in ("auto", "native", "torch"):
        raise ValueError(f"unknown backend {name!r}; expected 'auto', 'native' or 'torch'")
    previous, _override = _override, name
    try:
        yield
    finally:
        _override = previous


def native_takes(*tensors: Tensor | None) -> bool:
    """Whether all given tensors are of a kind that the native core computes with."""
    return all(t is None or (t.device.type == "cpu" and t.dtype in _NATIVE_DTYPES) for t in tensors)


def under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """What autocast does with the inputs of torch's own attention: brings them to its type (float64 stays)."""
    first = tensors[0]
    if not torch.is_autocast_enabled(first.device.type) or first.dtype == torch.float64 or not first.is_floating_point():
        return tensors
    narrow = torch.get_autocast_dtype(first.device.type)
    return tuple(t.to(narrow) for t in tensors)


def _in_a_transform() -> bool:
    """Whether derivatives are asked for otherwise than by a backward: `torch.func.grad` has no rule for our operators, and
    forward mode would quietly take their derivative for 0. The twins have both (where torch has). `vmap` works on either."""
    if torch.compiler.is_compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    return stack is not None and any(layer.key() in _DERIVING for layer in stack)


_DERIVING = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def one_device(name: str, *tensors: Tensor | None) -> None:
    """ValueError unless all are on one device: kernels are given addresses and would read those of another as their own."""
    first: torch.device | None = None
    for t in tensors:
        if t is None:
            continue
        first = t.device if first is None else first
        if t.device != first:
            raise ValueError(f"{name}: all tensors must be on one device, got {first} and {t.device}")


def can_be_looked_at(t: Tensor) -> bool:
    """Whether a decision may depend on the numbers: on the CPU, not in a graph, under a transform or without numbers at all."""
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and type(t) is Tensor \
        and torch._C._functorch.get_interpreter_stack() is None


def always() -> bool:
    """For `cuda` of `use_native`: the kernels take whatever the operator takes."""
    return True


def use_native(*tensors: Tensor | None, prefer_torch: bool = False, cuda: Callable[[], bool] | None = None) -> bool:
    """Whether compiled kernels compute this call. See `kernels.launch_on` for which.

    prefer_torch: measured to be faster in torch for this shape on the CPU, used under `auto` only.
    cuda: whether the CUDA kernels take this call, asked where they serve the tensors; None: there is none for it.
    """
    if _override == "torch":
        return False
    given = [t for t in tensors if t is not None]
    on_device = bool(given) and any(cuda_kernels_of(t) is not None for t in given)
    if on_device:
        takes = cuda is not None and len({t.device for t in given}) == 1 and all(t.dtype in _NATIVE_DTYPES for t in given) and cuda()
    else:
        takes = NATIVE_AVAILABLE and native_takes(*tensors)
    if takes and _in_a_transform():
        if _override == "native":
            raise ValueError("compiled kernels have no forward-mode derivative and no torch.func.grad; use the plain-torch twin")
        return False
    if _override == "native":
        if not takes:
            kinds = ", ".join(f"{t.dtype} on {t.device}" for t in given)
            wanted = "the CUDA kernels do not take this call" if on_device else \
                "the native core takes float32, bfloat16 or float16 on the CPU"
            raise ValueError(f"{wanted}, got {kinds}" + ("" if NATIVE_AVAILABLE else " (and the compiled module is missing)"))
        return True
    return takes and not (prefer_torch and not on_device) and not torch.compiler.is_exporting()
