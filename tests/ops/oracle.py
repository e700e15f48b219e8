"""Compare an operator in float32 with its twin in float64, values and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vlm import ops
from vlm.ops import Backend

Call = Callable[..., tuple[Tensor, ...]]


def run(call: Call, inputs: Sequence[Tensor], backend: Backend, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, then the gradients of a fixed random functional of them (-inf entries left out)."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    with ops.backend(backend):
        outputs = call(*leaves)
    generator = torch.Generator().manual_seed(3)
    loss = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
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
