"""Pooling by a stride and clips of a length: exact checks of core-pool."""

from __future__ import annotations

import pytest
import torch

from vlm import ops


@pytest.mark.parametrize("kind", ["average", "max"])
@pytest.mark.parametrize(("h", "w", "stride"), [(4, 6, 2), (5, 7, 2), (1, 3, 2), (7, 5, 3), (2, 2, 5)])
def test_core_pool_by_a_stride_reduces_windows(kind: ops.StridePool, h: int, w: int, stride: int) -> None:
    x = torch.randn(2, h, w, 3, generator=torch.Generator().manual_seed(0))
    got = ops.stride_pool(x, stride, kind=kind)
    assert got.shape == (2, -(-h // stride), -(-w // stride), 3)
    for r in range(got.shape[1]):
        for c in range(got.shape[2]):
            window = x[:, r * stride : (r + 1) * stride, c * stride : (c + 1) * stride].flatten(1, 2)
            torch.testing.assert_close(got[:, r, c], window.mean(1) if kind == "average" else window.amax(1))


def test_core_pool_stride_identity_constant_and_divisible_averages_are_adaptive() -> None:
    x = torch.randn(2, 6, 8, 3)
    for kind in ("average", "max", "bilinear"):
        assert torch.equal(ops.stride_pool(x, 1, kind=kind), x)
        torch.testing.assert_close(ops.stride_pool(torch.full((1, 5, 7, 2), 3.25), 2, kind=kind), torch.full((1, 3, 4, 2), 3.25))
        assert ops.stride_pool(x[:0], 2, kind=kind).shape == (0, 3, 4, 3)
    torch.testing.assert_close(ops.stride_pool(x, 2), ops.adaptive_pool(x, (3, 4)))
    torch.testing.assert_close(ops.stride_pool(x, 2, kind="bilinear"), ops.adaptive_pool(x, (3, 4)))  # centres between four
    odd = ops.stride_pool(torch.arange(5.0).view(1, 1, 5, 1), 2, kind="bilinear").flatten()
    torch.testing.assert_close(odd, torch.tensor([1 / 3, 2.0, 11 / 3]))


def test_core_pool_gradients_go_to_the_mean_or_to_the_greatest() -> None:
    x = torch.tensor([[1.0, 5], [2, 3], [4, 0]]).view(1, 3, 2, 1).requires_grad_()
    for kind, expected in (("average", [0.25] * 4 + [0.5] * 2), ("max", [0.0, 1, 0, 0, 1, 0])):
        (grad,) = torch.autograd.grad(ops.stride_pool(x, 2, kind=kind).sum(), x)
        assert grad.flatten().tolist() == expected
    assert torch.autograd.gradcheck(lambda t: ops.stride_pool(t, 2, kind="bilinear"), torch.rand(1, 3, 4, 2).double().requires_grad_())
    overlapping = torch.ones(1, 3, 2, 1, requires_grad=True)  # bins 0-1 and 1-2 of three rows
    (grad,) = torch.autograd.grad(ops.adaptive_pool(overlapping, (2, 2)).sum(), overlapping)
    assert grad[0, :, 0, 0].tolist() == [0.5, 1.0, 0.5]


@pytest.mark.parametrize(("length", "frames", "expected"), [(1, 4, [0] * 4), (3, 4, [0, 0, 1, 2]), (3, 6, [0, 0, 1, 1, 2, 2]), (4, 4, [0, 1, 2, 3]),
                                                            (5, 4, [0, 1, 2, 3, 4])])
def test_core_pool_clips_that_are_too_short_repeat_frames(length: int, frames: int, expected: list[int]) -> None:
    x = torch.arange(length).view(1, length, 1, 1, 1).expand(2, length, 2, 2, 3)
    assert ops.repeat_frames(x, frames)[0, :, 0, 0, 0].tolist() == expected
    pooled = ops.adaptive_pool(ops.repeat_frames(x, frames).double(), (min(frames, 4), 1, 1))
    assert pooled.shape == (2, min(frames, 4), 1, 1, 3)


def test_pools_export_and_refuse(onnx_run) -> None:  # type: ignore[no-untyped-def]
    class Pools(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(ops.stride_pool(x, 2, kind=kind) for kind in ("average", "max", "bilinear"))

    x = torch.randn(3, 5, 6, 4)
    for got, expected in zip(onnx_run(Pools(), (x,)), Pools()(x), strict=True):
        torch.testing.assert_close(torch.as_tensor(got), expected, atol=1e-6, rtol=1e-6)
    for call in (lambda: ops.stride_pool(x, 0), lambda: ops.stride_pool(x[0], 2), lambda: ops.stride_pool(x, 2, kind="min"),  # type: ignore[arg-type]
                 lambda: ops.repeat_frames(x[:, :0], 2)):
        with pytest.raises(ValueError, match="expected"):
            call()
