"""CUDA operators where neither a GPU nor their module is: who takes what, and shapes for the compiler.

Kernels are tested by ctest, the operators over them by test_cuda_operators.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm import ops
from vlm.ops.attention_native import native_attention, native_attention_backward
from vlm.ops.backend import always, use_native
from vlm.ops.contrastive_cuda import pair_loss_cuda, pair_loss_cuda_backward
from vlm.ops.cuda_core import cuda_kernels, cuda_kernels_of, installed_cuda_kernels
from vlm.ops.kernels import launch_on
from vlm.ops.vocabulary_cuda import cross_entropy_cuda, cross_entropy_cuda_backward

not_built = pytest.mark.skipif(installed_cuda_kernels() is not None, reason="the CUDA module is built")


@pytest.fixture
def for_meta() -> Iterator[None]:
    """Kernels that say they are for tensors without storage: enough to see who would take what."""
    with cuda_kernels(SimpleNamespace(device_type="meta")):
        yield


def test_kernels_serve_the_tensors_of_the_device_that_they_name(for_meta: None) -> None:
    assert cuda_kernels_of(torch.zeros(2)) is None
    assert cuda_kernels_of(torch.empty(2, device="meta")) is not None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_usable_gpu_its_tensors_are_not_served() -> None:
    with cuda_kernels(SimpleNamespace(device_type="cuda")), FakeTensorMode():
        assert cuda_kernels_of(torch.empty(2, device="cuda")) is None


@not_built
def test_without_the_module_tensors_of_a_gpu_take_plain_torch() -> None:
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        assert not use_native(x, cuda=always)
        with ops.backend("native"), pytest.raises(ValueError, match="float32 on cuda"):
            use_native(x, cuda=always)


def test_nothing_is_launched_beside_tensors_of_other_devices() -> None:
    with pytest.raises(RuntimeError, match="no compiled kernels for tensors on meta"), launch_on(torch.empty(2, device="meta")):
        pass


def test_kernels_are_asked_for_tensors_of_one_device_in_their_types(for_meta: None) -> None:
    x = torch.empty(2, 3, device="meta")
    assert use_native(x, x.half(), None, cuda=always)
    assert not use_native(x, cuda=lambda: False)
    assert not use_native(x)
    assert not use_native(x, x.double(), cuda=always)
    assert not use_native(x, torch.empty(2, 3), cuda=always)
    with ops.backend("torch"):
        assert not use_native(x, cuda=always)
    with ops.backend("native"), pytest.raises(ValueError, match="CUDA kernels do not take"):
        use_native(x)


def test_cpu_results_do_not_change() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    with ops.backend("torch"):
        expected = ops.attention(q, k, v, causal=True)
    torch.testing.assert_close(ops.attention(q, k, v, causal=True), expected)


def test_attention_has_shapes_for_the_compiler() -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(shape, device="cuda") for shape in ((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 6)))
        bias = torch.empty(1, 4, 1, 7, device="cuda")
        out, lse = native_attention(q, k, v, None, bias, 0.3, True, 2)
        assert out.shape == (2, 4, 5, 6)
        assert out.stride() == (4 * 5 * 6, 6, 4 * 6, 1)
        assert out.is_cuda
        assert lse.shape == (2, 4, 5)
        options = (None, None, None, None, 0.3, True, 2, 0, 0, 0.0, 0.0, 0)
        grads = native_attention_backward(q, k, v, None, bias, None, *options, out, lse, out, lse, True, False, False)
        assert [g.shape for g in grads] == [q.shape, k.shape, v.shape, bias.shape, (0,), (0,)]
        out, lse = native_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), None, bias, 0.3, True, 2)
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


def test_cross_entropy_has_shapes_for_the_compiler() -> None:
    with FakeTensorMode():
        hidden, weight, bias = (torch.empty(shape, device="cuda") for shape in ((5, 8), (11, 8), (11,)))
        labels = torch.empty(5, dtype=torch.int64, device="cuda")
        loss, _, lse = cross_entropy_cuda(hidden, weight, bias, labels, None, 0.1, 0.0, 0.0)
        assert loss.shape == lse.shape == (5,)
        grads = cross_entropy_cuda_backward(hidden, weight, bias, labels, None, lse, loss, 0.1, 0.0, 0.0, True, False, True)
        assert [g.shape for g in grads] == [hidden.shape, (0,), bias.shape]
