"""Compare an operator in float32 with its twin in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from vlm import ops
from vlm.ops import Backend

Call = Callable[..., tuple[Tensor, ...]]


def run(call: Call, inputs: Sequence[Tensor], backend: Backend, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of a fixed random functional of them (-inf entries left out)."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    with ops.backend(backend):
        outputs = call(*leaves)
    generator = torch.Generator("cpu").manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu").to(output.device)
        loss = loss + (torch.where(output.isinf(), 0.0, output).double() * weights).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*(o.detach() for o in outputs), *(torch.zeros(0) if g is None else g for g in gradients)]


def error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact| over max(|exact|, 1e-3); infinities must agree."""
    if got.shape != exact.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    if not torch.equal(got.isinf(), exact.isinf()) or got.isnan().any():
        return float("inf")
    got, exact = torch.where(got.isinf(), 0.0, got).double(), torch.where(exact.isinf(), 0.0, exact).double()
    return float((got - exact).abs().max() / exact.abs().max().clamp(min=1e-3))


def errors(call: Call, inputs: Sequence[Tensor], backend: Backend = "native",
           dtype: torch.dtype = torch.float32) -> list[float]:
    exact = run(call, inputs, "torch", torch.float64)
    return [error(a, b) for a, b in zip(run(call, inputs, backend, dtype), exact)]


class Recorder(TorchFunctionMode):
    """The calls of operators of the native core, as autograd sees them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[Any, tuple[Any, ...]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if getattr(function, "namespace", None) == "vlm":
            self.calls.setdefault(function, tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), args))
        return function(*args, **(kwargs or {}))
