"""The selective state-space scan: kernel, twin and quadratic form against the definition, gradients against float64."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.ops.backend import core
from vlm.ops.ssm_scan_native import CHUNK, native_ssm_scan, native_ssm_scan_backward
from vlm.ops.ssm_scan_reference import _pairs


def tensors(batch: int, n: int, channels: int, states: int) -> list[Tensor]:
    """x, delta, rate, b, c, skip, state."""
    shapes = ((batch, n, channels), (batch, n, channels), (channels, states), (batch, n, states), (batch, n, states), (channels,),
              (batch, channels, states))
    x, delta, rate, b, c, skip, state = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return [x, delta - 1, -rate.abs() - 0.01, b, c, skip, state]


def call(*inputs: Tensor, **named: object) -> tuple[Tensor, Tensor]:
    return ops.ssm_scan(*inputs[:6], state=inputs[6], **named)  # type: ignore[arg-type]


def definition(inputs: list[Tensor], keep: Tensor, segment: Tensor) -> tuple[Tensor, Tensor]:
    """One number after the other, with Python's own exp and log."""
    x, delta, rate, b, c, skip, state = inputs
    out, h = torch.zeros_like(x), state.clone()
    for row in range(x.shape[0]):
        for channel in range(x.shape[2]):
            previous = None
            for t in range(x.shape[1]):
                if not keep[row, t]:
                    continue
                if previous is not None and previous != int(segment[row, t]):
                    h[row, channel] = 0.0
                previous = int(segment[row, t])
                step = math.log1p(math.exp(float(delta[row, t, channel])))
                for s in range(rate.shape[1]):
                    h[row, channel, s] = math.exp(step * float(rate[channel, s])) * h[row, channel, s] \
                        + step * x[row, t, channel] * b[row, t, s]
                out[row, t, channel] = h[row, channel] @ c[row, t] + skip[channel] * x[row, t, channel]
    return out, h


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_tokenunify_chunked_equals_sequential(backend: ops.Backend, level: str) -> None:
    inputs = tensors(2, 70, 5, 3)
    keep = torch.rand(2, 70) < 0.7
    segment = (torch.rand(2, 70) < 0.1).cumsum(1)
    out, last = definition(inputs, keep, segment)
    with ops.backend(backend):
        got, got_last = call(*(t.float() for t in inputs), key_mask=keep, segment=segment)
    assert error(got, out) < 2e-6
    assert error(got_last, last) < 2e-6


def test_core_tokenunify_sequential_equals_the_quadratic_form() -> None:
    x, delta, rate, b, c, skip, state = tensors(2, 40, 6, 4)
    packed = (torch.rand(2, 40) < 0.1).cumsum(1).to(torch.int32)
    for run_ in (None, packed - packed[:, :1]):
        quadratic = _pairs(x, torch.nn.functional.softplus(delta), rate, b, c, skip, state, run_)
        with ops.backend("torch"):
            sequential = call(x, delta, rate, b, c, skip, state, segment=run_)
        for a, other in zip(quadratic, sequential):
            assert error(a, other) < 1e-12


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 131])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (17, 16), (70, 5), (130, 16)])
def test_native_values_and_gradients_match_float64(length: int, masks: bool, channels: int, states: int, level: str) -> None:
    keep = torch.rand(2, length) < 0.7 if masks else None
    segment = (torch.rand(2, length) < 0.05).cumsum(1) if masks else None

    def masked(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return call(*inputs, key_mask=keep, segment=segment)

    compared = errors(masked, tensors(2, length, channels, states))
    assert max(compared if length else compared[:2]) < 1e-5  # without positions the twin gives some no gradient at all


def test_the_twin_passes_gradcheck() -> None:
    keep = torch.tensor([[True, True, False, True, True]])
    segment = torch.tensor([[0, 0, 9, 0, 1]])
    leaves = [t.requires_grad_() for t in tensors(1, 5, 3, 2)]
    assert torch.autograd.gradcheck(lambda *a: call(*a, key_mask=keep, segment=segment), leaves)


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    inputs = tensors(1, 800, 64, 16)
    for mine, theirs in zip(errors(call, inputs), errors(call, inputs, "torch")):
        assert mine <= 2 * theirs + 1e-7


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_pieces_that_pass_the_state_equal_one_call(backend: ops.Backend) -> None:
    inputs = tensors(2, 90, 9, 4)

    def pieces(x: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outs = []
        for part in (slice(0, 1), slice(1, 66), slice(66, 90)):
            out, state = ops.ssm_scan(x[:, part], delta[:, part], rate, b[:, part], c[:, part], skip, state=state)
            outs.append(out)
        return torch.cat(outs, 1), state

    for got, exact in zip(run(pieces, inputs, backend, torch.float32), run(call, inputs, "torch", torch.float64)):
        assert error(got, exact) < 5e-6


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_does_not_exist_does_not_leak(backend: ops.Backend) -> None:
    inputs = tensors(2, 80, 6, 4)
    keep = torch.rand(2, 80) < 0.5
    results = []
    for filling in (math.nan, 0.0):
        filled = [torch.where(keep[..., None], t, filling) if t.ndim == 3 and t.shape[1] == 80 else t for t in inputs]
        results.append(run(lambda *a: call(*a, key_mask=keep), filled, backend, torch.float32))
    for place, (a, b) in enumerate(zip(*results)):
        assert torch.equal(a, b), place
    assert (results[0][0][~keep] == 0).all()


def test_bits_do_not_depend_on_threads_or_strides(level: str) -> None:
    inputs = tensors(2, 150, 150, 16)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(call, inputs, "native", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    x, delta, rate, b, c, skip, state = (t.float() for t in inputs)
    fused = torch.cat([b, c, x], 2)
    with ops.backend("native"):
        expected = call(x, delta, rate, b, c, skip, state)[0]
        got = call(fused[..., 32:], delta.mT.contiguous().mT, rate, fused[..., :16], fused[..., 16:32], skip, state)[0]
    assert torch.equal(got, expected)


@given(batch=st.integers(0, 2), n=st.integers(1, 140), channels=st.integers(1, 80), states=st.integers(1, 20))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_random_shapes(batch: int, n: int, channels: int, states: int) -> None:
    assert max(errors(call, tensors(batch, n, channels, states))) < 1e-5


def test_large_and_small_steps_stay_finite() -> None:
    inputs = tensors(1, 70, 8, 4)
    inputs[1] = torch.linspace(-120, 120, 70, dtype=torch.float64)[None, :, None].expand(1, 70, 8).contiguous()
    assert max(errors(call, inputs)) < 1e-5


def test_half_precision_keeps_its_type_and_the_state_is_wide() -> None:
    half = [t.bfloat16() for t in tensors(1, 80, 8, 4)]
    out, last = ops.ssm_scan(*half[:6])
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert error(out, ops.ssm_scan(*(t.double() for t in half[:6]))[0]) < 1e-2


def test_operator_contract() -> None:
    assert core().SSM_CHUNK == CHUNK
    inputs = [t.float().requires_grad_() for t in tensors(1, 70, 5, 3)]
    keep, packed = torch.rand(1, 70) < 0.8, torch.zeros(1, 70, dtype=torch.int32)
    torch.library.opcheck(native_ssm_scan, (*inputs, keep, packed))
    plain = [t.detach() for t in inputs]
    borders = native_ssm_scan(*plain, keep, packed)[2]
    torch.library.opcheck(native_ssm_scan_backward, (*plain, keep, packed, borders, plain[0], plain[6]),
                          test_utils=("test_schema", "test_faketensor"))


class _Graph(torch.nn.Module):
    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return ops.ssm_scan(*inputs[:6], state=inputs[6], key_mask=inputs[7])


@pytest.mark.filterwarnings("ignore")
def test_compile_export_and_onnx_keep_the_values() -> None:
    import onnxruntime

    inputs = (*(t.float() for t in tensors(2, 9, 4, 3)), torch.rand(2, 9) < 0.8)
    for a, b in zip(torch.compile(_Graph(), fullgraph=True, backend="aot_eager")(*inputs), _Graph()(*inputs)):
        torch.testing.assert_close(a, b)
    along = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=4096)}
    shapes = ((along, along, None, along, along, None, {0: along[0]}, along),)
    program = torch.export.export(_Graph(), inputs, dynamic_shapes=shapes)
    other = [*(t.float() for t in tensors(3, 21, 4, 3)), torch.rand(3, 21) < 0.8]
    for place in (2, 5):
        other[place] = inputs[place]
    expected = _Graph()(*other)
    for a, b in zip(program.module()(*other), expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    buffer = io.BytesIO()
    torch.onnx.export(_Graph(), inputs, dynamo=True, verbose=False, dynamic_shapes=shapes).save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), other)}
    for got, wanted in zip(session.run(None, feeds), expected):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("place", "given", "message"), [
    (1, torch.zeros(1, 5, 3), "wants x and delta"),
    (2, torch.zeros(3, 2), "rate must be"),
    (3, torch.zeros(1, 5, 3), "b must be"),
    (5, torch.zeros(3), "skip must be"),
    (6, torch.zeros(1, 4, 3), "state must be"),
    (2, torch.ones(4, 2), "rate must not be above 0"),
])
def test_wrong_arguments_are_named(place: int, given: Tensor, message: str) -> None:
    inputs = [t.float() for t in tensors(1, 5, 4, 2)]
    inputs[place] = given
    with pytest.raises(ValueError, match=message), ops.backend("native"):
        call(*inputs)
