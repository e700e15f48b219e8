"""The operators as torch sees them: schemas, fake shapes, compile, export, double backward, fork, self-test."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.queues import SimpleQueue

import pytest
import torch
from torch import Tensor

from vlm import ops
from vlm.ops import masks
from vlm.ops.attention_native import _attention, native_attention
from vlm.ops.backend import core
from vlm.ops.contrastive_native import native_pair_loss


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


ATTENTION_CASES = [
    (leaf(2, 4, 5, 8), leaf(2, 2, 9, 8), leaf(2, 2, 9, 6), torch.arange(18).view(2, 9) % 3 > 0, leaf(1, 4, 5, 9), 0.3, True, 4),
    (leaf(2, 4, 5, 8), leaf(2, 2, 9, 8), leaf(2, 2, 9, 6), None, None, 0.3, False, 0),
]


@pytest.mark.parametrize("arguments", ATTENTION_CASES, ids=["full", "plain"])
def test_attention_passes_opcheck(arguments: tuple[object, ...]) -> None:
    q, k, v, key_mask, bias, scale, causal, offset = arguments
    torch.library.opcheck(_attention, (q, k, v, key_mask, bias, None, None, None, None, None, scale, causal, offset, 0, 0, 0.0, 0.0, 0))


def test_attention_with_every_extra_passes_opcheck() -> None:
    q, k, v = leaf(2, 2, 5, 8), leaf(2, 1, 9, 8), leaf(2, 1, 9, 6)
    program = masks.MaskProgram(masks.Lambda(4, 1), masks.Segments(torch.arange(9)[None, :5] // 3, torch.arange(9)[None] // 3, shared=0),
                                masks.Dense(torch.rand(1, 2, 5, 9) < 0.8))
    code, arrays, dense = program.lower(masks.MaskShape(2, 2, 5, 9, q.device))
    torch.library.opcheck(_attention, (q, k, v, None, None, leaf(2, 13), torch.rand(2, requires_grad=True), arrays, dense, code, 1.0,
                                       True, 4, 0, 0, 5.0, 0.2, 7))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_pair_loss_passes_opcheck(loss: str, groups: bool) -> None:
    ids = (torch.arange(5), torch.arange(7)) if groups else (None, None)
    bias = torch.tensor(-1.0, requires_grad=True) if loss == "sigmoid" else None
    torch.library.opcheck(native_pair_loss, (loss, leaf(5, 8), leaf(7, 8), torch.tensor(1.0, requires_grad=True), bias, *ids, 2,
                                             *ids, None, None, None, [1.0, 0.0, 0.0, 9.0, 1.0], [False, groups, True]))


def everything(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out = ops.attention(q, k, v, causal=True, bias=bias)
    x, y = out[:, 0, 0], out[:, 1, 1]
    rows, columns = ops.contrastive_softmax(x, y, bias[0, 0, 0, 0])
    sigmoid, _ = ops.contrastive_sigmoid(x, y, bias[0, 0, 0, 1], bias[0, 0, 0, 2])
    return (rows + columns + sigmoid).sum()


def test_compiles_as_one_graph_forward_and_backward() -> None:
    inputs = [leaf(4, 2, 6, 8), leaf(4, 2, 6, 8), leaf(4, 2, 6, 8), leaf(1, 2, 6, 6)]
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    with ops.backend("native"):
        expected = torch.autograd.grad(everything(*inputs), inputs)
        got = torch.autograd.grad(compiled(*inputs), inputs)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_compiles_under_autocast_with_the_types_of_eager() -> None:
    def step(q: Tensor, s: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            out = ops.attention(q, q, q, causal=True)
            rows, _ = ops.contrastive_softmax(out[:, 0, 0], out[:, 0, 1], s)
            return out.sum() + rows.sum()

    q, s = leaf(4, 2, 40, 16), torch.tensor(1.0, requires_grad=True)
    with ops.backend("native"):
        expected, got = step(q, s), torch.compile(step, fullgraph=True, backend="aot_eager")(q, s)
        for a, b in zip(torch.autograd.grad(got, (q, s)), torch.autograd.grad(expected, (q, s))):
            torch.testing.assert_close(a, b)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)


class Attend(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ops.attention(q, k, v, causal=True, key_mask=mask)


def test_export_takes_the_twin_with_dynamic_shapes() -> None:
    example = (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    tensor = {0: batch, 2: length}
    program = torch.export.export(Attend(), example, dynamic_shapes=(tensor, tensor, tensor, {0: batch, 1: length}))
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    q, mask = torch.randn(3, 2, 9, 8), torch.rand(3, 9) < 0.6
    with ops.backend("native"):
        expected = Attend()(q, q, q, mask)
    torch.testing.assert_close(program.module()(q, q, q, mask), expected)


def test_export_of_the_native_operator_keeps_it_in_the_graph() -> None:
    example = (torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    with ops.backend("native"):
        program = torch.export.export(Attend(), example)
    assert "vlm.attention.default" in {str(node.target) for node in program.graph.nodes}


@pytest.mark.parametrize("operator", ["attention", "contrastive"])
def test_double_backward_is_refused(operator: str) -> None:
    x = leaf(1, 1, 4, 8)
    with ops.backend("native"):
        if operator == "attention":
            value = ops.attention(x, x, x).square().sum()
        else:
            value = ops.contrastive_softmax(x[0, 0], x[0, 0], torch.zeros(()))[0].square().sum()
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def _attend_in_child(q: Tensor, result: SimpleQueue) -> None:
    # Nothing of torch that would use its own threads: OpenMP does not survive a fork, and is not what is tested.
    out, _ = native_attention(q, q, q, None, None, 1.0, False, 0)
    result.put(out[1, 7, 199, 15].item())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_worker_can_compute_after_the_parent_has() -> None:
    torch.set_num_threads(2)
    q = torch.ones(2, 8, 200, 16)
    native_attention(q, q, q, None, None, 1.0, False, 0)
    assert core().pool_size() >= 1
    context = multiprocessing.get_context("fork")
    result = context.SimpleQueue()
    child = context.Process(target=_attend_in_child, args=(q, result), daemon=True)
    child.start()
    child.join(timeout=30)
    assert child.exitcode == 0, "the child hangs or died"
    assert result.get() == pytest.approx(1.0)


def test_backend_override_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), ops.backend("torch"):
        raise KeyError
    assert ops.current_backend() == "auto"
    with pytest.raises(ValueError, match="unknown backend"), ops.backend("cuda"):  # type: ignore[arg-type]
        pass


def test_levels_can_be_forced_and_unknown_ones_are_refused() -> None:
    native = core()
    assert native.supported_levels()[0] == "portable"
    with pytest.raises(ValueError, match="unknown level"):
        native.set_level("sse9")


def test_self_test_covers_every_operator_at_every_level() -> None:
    native = core()
    before = native.active_level()
    checks = ops.self_test()
    assert {(c.operator, c.level) for c in checks} == {
        (operator, level)
        for operator in (
            "attention",
            "attention_statistics",
            "contrastive_sigmoid",
            "contrastive_softmax",
            "late_interaction",
            "linear_cross_entropy",
            "linear_decay",
            "linear_distillation",
            "merge_attention",
            "selection",
            "block_memory",
            "sequence_alignment",
            "ssm_scan",
            "tokens",
            "window_attention",
        )
        for level in native.supported_levels()
    }
    assert all(c.ok for c in checks), checks
    assert native.active_level() == before


def test_self_test_notices_a_broken_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            return getattr(core(), name)

        def attention_forward(self, **arguments: object) -> None:
            core().attention_forward(**(arguments | {"scale": 0.5}))

    monkeypatch.setattr("vlm.ops.kernels.core", Broken)
    failed = {c.operator for c in ops.self_test() if not c.ok}
    assert failed == {"attention"}
