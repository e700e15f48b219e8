"""CUDA operators where no GPU is: who takes what, and shapes for the compiler. Kernels are tested by ctest."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm import ops
from vlm.ops import attention_cuda
from vlm.ops.attention_cuda import attention_cuda_takes
from vlm.ops.contrastive_cuda import pair_loss_cuda, pair_loss_cuda_backward
from vlm.ops.cuda_core import cuda_module, cuda_takes


def test_tensors_on_the_cpu_are_never_taken() -> None:
    q = torch.randn(1, 2, 3, 4)
    assert not cuda_takes(q)
    assert not attention_cuda_takes(q, q, q, None)
    assert not cuda_takes(None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_module_is_not_looked_for() -> None:
    assert cuda_module() is None
    with FakeTensorMode():
        assert not cuda_takes(torch.empty(2, 3, device="cuda"))


def test_cpu_results_do_not_change() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    with ops.backend("torch"):
        expected = ops.attention(q, k, v, causal=True)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True), expected)


def test_attention_has_shapes_for_the_compiler() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, device="cuda") for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
        bias = torch.empty(1, 4, 1, 7, device="cuda")
        out, lse = attention_cuda.forward(q, k, v, None, bias, 0.3, True, 2)
        assert out.shape == (2, 4, 5, 6)
        assert out.stride() == (4 * 5 * 6, 6, 4 * 6, 1)
        assert out.is_cuda
        assert lse.shape == (2, 4, 5)
        grads = attention_cuda.backward(q, k, v, None, bias, 0.3, True, 2, out, lse, out, lse, True)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, bias.shape]
        halves = [t.bfloat16() for t in (q, k, v)]
        out, lse = attention_cuda.forward_bf16(*halves, None, bias, 0.3, True, 2)
        assert out.dtype == torch.bfloat16
        assert lse.dtype == torch.float32


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_contrastive_losses_have_shapes_for_the_compiler(loss: str) -> None:
    with FakeTensorMode():
        x, y, scalar = (torch.empty(shape, device="cuda") for shape in ((5, 8), (7, 8), ()))
        rows, columns, row_lse, column_lse = pair_loss_cuda(loss, x, y, scalar, scalar, None, None, 0)
        assert rows.shape == (5,)
        assert columns.shape == (7,)
        assert row_lse.shape == ((5,) if loss == "softmax" else (0,))
        grads = pair_loss_cuda_backward(loss, x, y, scalar, scalar, None, None, 0, row_lse, column_lse, rows, columns,
                                        True, False)
        assert [g.shape for g in grads] == [x.shape, (0,), (), ()]
