"""A quick check of every native operator on this machine, for `vlm doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm.ops.alignment import sequence_alignment
from vlm.ops.attention import attention
from vlm.ops.backend import NATIVE_AVAILABLE, backend, core
from vlm.ops.block_memory import MemoryShape, block_memory
from vlm.ops.contrastive import contrastive_sigmoid, contrastive_softmax
from vlm.ops.late_interaction import late_interaction
from vlm.ops.linear_decay import linear_decay
from vlm.ops.merge import merge_attention
from vlm.ops.selection import block_sparse_attention, select_hierarchical
from vlm.ops.ssm_scan import ssm_scan
from vlm.ops.statistics import attention_column_sums, attention_row_statistics, attention_rows
from vlm.ops.tokens import bipartite_match, gather_tokens, merge_tokens
from vlm.ops.tokens_select import select_top
from vlm.ops.vocabulary import linear_cross_entropy
from vlm.ops.vocabulary_distillation import linear_distillation
from vlm.ops.window_attention import window_attention

TOLERANCE = 2e-5
"""Largest accepted error, relative to the largest value of the exact result, forward and gradients."""


class OperatorCheck(NamedTuple):
    """One operator at one instruction-set level against its float64 twin."""

    operator: str
    level: str
    ok: bool
    max_error: float


def self_test() -> list[OperatorCheck]:
    """Run the operators of `_CASES`, values and gradients, at every level this machine has; takes well under a second.

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


def _statistics_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 61, 24), (2, 2, 300, 24)))
    options: dict[str, Any] = {"causal": True, "key_mask": torch.tensor([290, 77])}

    def call(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        rows = attention_row_statistics(q, k, **options)
        return (attention_column_sums(q, k, **options), torch.where(rows.lse.isinf(), 0.0, rows.lse), rows.entropy,
                attention_rows(q, k, torch.tensor([0, 60]), **options))

    return call, [q, k]


def _merge_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    shapes = [(2, 3, 41, 24), (2, 3, 41, 24), (2, 3, 41), (2, 3, 41)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return lambda a, b, la, lb: merge_attention((a, la), (b, lb)), inputs


def _tokens_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    metric, x = (torch.randn(2, 197, width, generator=generator, dtype=torch.float64) for width in (24, 70))

    def call(x: Tensor) -> tuple[Tensor, ...]:
        merged, sizes = merge_tokens(x, None, bipartite_match(metric.to(x.dtype), 80))
        best = select_top(merged.detach()[..., 0], 50, 1)
        return merged, sizes, gather_tokens(merged, best.indices)

    return call, [x]


def _vocabulary_factors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((61, 24), (1031, 24), (1031,))]


def _cross_entropy_case() -> tuple[Call, list[Tensor]]:
    labels = torch.arange(61) * 17
    labels[::9] = -100

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        found = linear_cross_entropy(hidden, weight, labels, bias=bias, smoothing=0.1, z_loss=1e-3, chunk=20 * 1031)
        return (found.loss,)

    return call, _vocabulary_factors()


def _distillation_case() -> tuple[Call, list[Tensor]]:
    teacher = torch.randn(61, 1031, generator=torch.Generator().manual_seed(4), dtype=torch.float64)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        logits = teacher.to(hidden.dtype)
        return (linear_distillation(hidden, weight, teacher_logits=logits, bias=bias, divergence="js", chunk=20 * 1031),)

    return call, _vocabulary_factors()


def _alignment_case() -> tuple[Call, list[Tensor]]:
    cost = torch.rand(19, 23, 31, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    lengths = torch.arange(19) + 5
    return lambda c: (sequence_alignment(c, lengths, lengths + 2, gamma=0.5),), [cost]


def _late_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(4)
    v, w = (torch.randn(9, tokens, 40, generator=generator, dtype=torch.float64) for tokens in (31, 19))
    mask = torch.arange(19) < torch.arange(1, 19, 2)[:, None]
    return lambda v, w: late_interaction(v, w, mask_w=mask), [v, w]


def _linear_decay_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(6)
    shapes = [(2, 3, 67, 24), (2, 3, 67, 24), (2, 3, 67, 17), (3,), (2, 3, 24, 17)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    mask = torch.arange(67) < torch.tensor([67, 50])[:, None]

    def call(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return linear_decay(q, k, v, -slopes.abs(), state=state, key_mask=mask)

    return call, inputs


def _ssm_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    shapes = [(2, 45, 35), (2, 45, 35), (35, 5), (2, 45, 5), (2, 45, 5), (35,), (2, 35, 5)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    mask = torch.arange(45) < torch.tensor([45, 31])[:, None]

    def call(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        return ssm_scan(x, delta, -rate.abs(), b, c, skip, state=state, key_mask=mask)

    return call, inputs


def _selection_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(8)
    # Quarters: products are exact in float32, so both sides choose the same blocks, equal scores included.
    q, k = (torch.randint(-6, 7, shape, generator=generator).double() / 4 for shape in ((2, 4, 61, 24), (2, 2, 300, 24)))
    v = torch.randn(2, 2, 300, 17, generator=generator, dtype=torch.float64)

    @torch.no_grad()  # with gradients it is the attention operator, which has a case of its own
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        blocks, scored = select_hierarchical(q, k, budget=48, block_q=16, window=20, sinks=4)
        return block_sparse_attention(q, k, v, blocks), blocks.index, scored

    return call, [q, k, v]


def _memory_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(10)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 120, 24), (2, 150, 24), (2, 150, 24))]
    shape = MemoryShape(n_init=3, n_local=20, block=5, topk=100, representatives=5, chunk=9)

    @torch.no_grad()
    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return tuple(block_memory(q, k, v, q.new_zeros(4, 30), q.new_zeros(4, 0, 24), shape=shape))

    return call, inputs


def _window_case() -> tuple[Call, list[Tensor]]:
    generator = torch.Generator().manual_seed(9)
    qkv, tau, table = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 9, 7, 3 * 2 * 16), (2,), (49, 2)))
    return lambda x, s, t: (window_attention(x, s, t, window=4, shift=2),), [qkv, tau.abs() * 4 + 1, table]


_CASES: dict[str, Callable[[], tuple[Call, list[Tensor]]]] = {
    "attention": _attention_case,
    "contrastive_softmax": _softmax_case,
    "contrastive_sigmoid": _sigmoid_case,
    "attention_statistics": _statistics_case,
    "merge_attention": _merge_case,
    "tokens": _tokens_case,
    "linear_cross_entropy": _cross_entropy_case,
    "linear_distillation": _distillation_case,
    "sequence_alignment": _alignment_case,
    "late_interaction": _late_case,
    "linear_decay": _linear_decay_case,
    "ssm_scan": _ssm_case,
    "selection": _selection_case,
    "block_memory": _memory_case,
    "window_attention": _window_case,
}


def _error(call: Call, inputs: list[Tensor]) -> float:
    results = []
    for name, dtype in (("torch", torch.float64), ("native", torch.float32)):
        leaves = [t.to(dtype).requires_grad_() for t in inputs]
        with backend(name):  # type: ignore[arg-type]
            outputs = call(*leaves)
            trained = [o.square().mean() for o in outputs if o.requires_grad]
        gradients = torch.autograd.grad(sum(trained), leaves) if trained else ()  # type: ignore[arg-type]
        results.append([*(o.detach() for o in outputs), *gradients])
    errors = [float((got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-12))
              for exact, got in zip(*results)]
    return max(errors) if all(error == error for error in errors) else float("inf")
