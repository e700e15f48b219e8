"""A quick check of every native operator on this machine, for `vlm doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlm.ops.attention import attention
from vlm.ops.backend import NATIVE_AVAILABLE, backend, core
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.late_interaction import late_interaction

TOLERANCE = 2e-5
"""Largest accepted error, relative to the largest value of the exact result, forward and gradients."""


class OperatorCheck(NamedTuple):
    """One operator at one instruction-set level against its float64 twin."""

    operator: str
    level: str
    ok: bool
    max_error: float


def self_test() -> list[OperatorCheck]:
    """Run every operator, values and gradients, at every level this machine has; takes well under a second.

    An empty list means that the compiled module is missing. The active level is the same afterwards.
    """
    if not NATIVE_AVAILABLE:
        return []
    native = core()
    before = native.active_level()
    checks = []
    try:
        for level in native.supported_levels():
            native.set_level(level)
            for name, build in _CASES.items():
                error = _error(*build())
                checks.append(OperatorCheck(name, level, error <= TOLERANCE, error))
    finally:
        native.set_level(before)
    return checks


Call = Callable[..., tuple[Tensor, ...]]


def _attention_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 4, 61, 24), (2, 2, 300, 24), (2, 2, 300, 17), (1, 4, 1, 300)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    lengths = torch.tensor([290, 77])

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        out = attention(q, k, v, causal=True, key_mask=lengths, bias=bias)
        return (out,)

    return call, inputs


def _pair_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(130, 40, generator=generator, dtype=torch.float64) for _ in range(2))
    return [torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1),
            torch.tensor(2.5, dtype=torch.float64)]


def _softmax_case() -> tuple[Call, list[Tensor]]:
    groups = torch.arange(130) // 2
    return lambda x, y, s: contrastive_softmax(x, y, s, groups_x=groups), _pair_inputs()


def _sigmoid_case() -> tuple[Call, list[Tensor]]:
    return contrastive_sigmoid, [*_pair_inputs(), torch.tensor(-4.0, dtype=torch.float64)]


def _late_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    v, w = (torch.randn(9, tokens, 40, generator=generator, dtype=torch.float64) for tokens in (31, 19))
    mask = torch.arange(19) < torch.arange(1, 19, 2)[:, None]
    return lambda v, w: late_interaction(v, w, mask_w=mask), [v, w]


_CASES: dict[str, Callable[[], tuple[Call, list[Tensor]]]] = {
    "attention": _attention_case,
    "contrastive_softmax": _softmax_case,
    "contrastive_sigmoid": _sigmoid_case,
    "late_interaction": _late_case,
}


def _error(call: Call, inputs: list[Tensor]) -> float:
    results = []
    for name, dtype in (("torch", torch.float64), ("native", torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        with backend(name):  # type: ignore[arg-type]
            outputs = call(*leaves)
            loss = sum(o.square().mean() for o in outputs)
        assert isinstance(loss, Tensor)
        results.append([*(o.detach() for o in outputs), *torch.autograd.grad(loss, leaves)])
    errors = [float((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12))
              for exact, got in zip(*results)]
    return max(errors) if all(error == error for error in errors) else float("inf")
