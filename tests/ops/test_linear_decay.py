"""Linear attention with decay: kernel, twin and gradients against the recurrence written here from the definition."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.ops.linear_decay_native import native_linear_decay, native_linear_decay_backward
from vlm.ops.linear_decay_reference import runs_of


def tensors(b: int, h: int, n: int, d: int, e: int) -> list[Tensor]:
    """q, k, v, log_decay, state."""
    q, k, v, state = (torch.randn(s, dtype=torch.float64) for s in ((b, h, n, d), (b, h, n, d), (b, h, n, e), (b, h, d, e)))
    return [q, k, v, -torch.rand(h, dtype=torch.float64) * 0.3, state]


def call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, **named: object) -> tuple[Tensor, Tensor]:
    return ops.linear_decay(q, k, v, log_decay, state=state, **named)  # type: ignore[arg-type]


def definition(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, keep: Tensor,
               segment: Tensor) -> tuple[Tensor, Tensor]:
    """Position by position, head by head: nothing shared with the code under test."""
    out, last = torch.zeros_like(v), state.clone()
    for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
        previous = None
        for t in range(q.shape[2]):
            if not keep[b, t]:
                continue
            if previous is not None and int(segment[b, t]) != previous:
                last[b, h] = 0.0
            previous = int(segment[b, t])
            last[b, h] = math.exp(float(log_decay[h])) * last[b, h] + torch.outer(k[b, h, t], v[b, h, t])
            out[b, h, t] = q[b, h, t] @ last[b, h]
    return out, last


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("chunk", [None, 1, 5, 16, 64])
def test_core_transnormer_recurrent_equals_chunked(backend: ops.Backend, chunk: int | None, level: str) -> None:
    inputs = tensors(2, 3, 37, 6, 9)
    keep = torch.rand(2, 37) < 0.7
    segment = (torch.rand(2, 37) < 0.15).cumsum(1)
    out, last = definition(*inputs, keep, segment)
    with ops.backend(backend):
        got, got_last = call(*(t.float() for t in inputs), key_mask=keep, segment=segment, chunk=chunk)
    assert error(got, out) < 2e-6
    assert error(got_last, last) < 2e-6


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize(("length", "chunk"), [(1, 64), (7, 64), (64, 64), (65, 64), (131, 64), (131, 17), (90, 256)])
def test_core_transnormer_chunked_equals_the_quadratic_masked_product(backend: ops.Backend, length: int, chunk: int) -> None:
    q, k, v, log_decay, _ = tensors(2, 3, length, 8, 12)
    lag = torch.arange(length)[:, None] - torch.arange(length)[None]
    fade = torch.where(lag >= 0, torch.exp(log_decay[:, None, None] * lag.clamp(min=0)), 0.0)
    with ops.backend(backend):
        got, _ = ops.linear_decay(q.float(), k.float(), v.float(), log_decay.float(), chunk=chunk)
    assert error(got, (q @ k.mT * fade) @ v) < 2e-6


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_transnormer_pieces_that_pass_the_state_equal_one_call(backend: ops.Backend) -> None:
    inputs = tensors(1, 2, 150, 8, 8)

    def pieces(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        outs = []
        for part in (slice(0, 70), slice(70, 71), slice(71, 150)):
            out, state = ops.linear_decay(q[:, :, part], k[:, :, part], v[:, :, part], log_decay, state=state)
            outs.append(out)
        return torch.cat(outs, 2), state

    for got, exact in zip(run(pieces, inputs, backend, torch.float32), run(call, inputs, "torch", torch.float64)):
        assert error(got, exact) < 5e-6


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_transnormer_without_decay_is_the_causal_sum(backend: ops.Backend) -> None:
    q, k, v, _, _ = tensors(2, 2, 99, 5, 6)
    expected = (q @ k.mT).tril() @ v
    with ops.backend(backend):
        got, last = ops.linear_decay(q.float(), k.float(), v.float(), torch.zeros(2))
    assert error(got, expected) < 2e-6
    assert error(last, k.mT @ v) < 2e-6


@pytest.mark.parametrize("length", [0, 1, 2, 13, 63, 64, 65, 127, 211])
@pytest.mark.parametrize("masks", [False, True])
def test_core_transnormer_gradients_match_float64(length: int, masks: bool, level: str) -> None:
    keep = torch.rand(2, length) < 0.7 if masks else None
    segment = (torch.rand(2, length) < 0.05).cumsum(1) if masks else None
    inputs = tensors(2, 3, length, 7, 18)

    def masked(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return call(*inputs, key_mask=keep, segment=segment)

    assert max(errors(masked, inputs)) < 2e-5


def test_the_twin_passes_gradcheck() -> None:
    keep = torch.tensor([[True, True, False, True, True, True, True]])
    segment = torch.tensor([[0, 0, 9, 0, 1, 1, 1]])
    leaves = [t.requires_grad_() for t in tensors(1, 2, 7, 3, 2)]
    for chunk in (3, 64):
        assert torch.autograd.gradcheck(lambda *a, c=chunk: call(*a, key_mask=keep, segment=segment, chunk=c), leaves)


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    inputs = tensors(1, 2, 1500, 32, 32)[:3]
    rate = torch.tensor([-0.01, -0.3], dtype=torch.float64)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_decay(q, k, v, rate.to(q.dtype))

    for mine, theirs in zip(errors(ours, inputs), errors(ours, inputs, "torch")):
        assert mine <= 2 * theirs + 1e-7


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_does_not_exist_does_not_leak(backend: ops.Backend) -> None:
    inputs = tensors(2, 2, 80, 6, 6)
    keep = torch.rand(2, 80) < 0.5
    keep[1, :40] = False  # padding on the left
    dirty = [*(torch.where(keep[:, None, :, None], t, math.nan) for t in inputs[:3]), *inputs[3:]]
    clean = [*(torch.where(keep[:, None, :, None], t, 0.0) for t in inputs[:3]), *inputs[3:]]

    def masked(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return call(*inputs, key_mask=keep)

    got, expected = (run(masked, t, backend, torch.float32) for t in (dirty, clean))
    for a, b in zip(got, expected):
        assert torch.equal(a, b)
    for gone in (got[0], *got[2:5]):  # out, dq, dk, dv
        assert (gone.transpose(1, 2)[~keep] == 0).all()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_packed_documents_equal_rows_of_their_own(backend: ops.Backend) -> None:
    q, k, v, log_decay, state = (t.float() for t in tensors(1, 2, 100, 6, 6))
    segment = torch.tensor([[0] * 30 + [1] * 1 + [2] * 69])
    with ops.backend(backend):
        out, last = call(q, k, v, log_decay, state, segment=segment)
        for part, given in ((slice(0, 30), state), (slice(30, 31), None), (slice(31, 100), None)):
            own, own_last = ops.linear_decay(q[:, :, part], k[:, :, part], v[:, :, part], log_decay, state=given)
            assert error(out[:, :, part], own) < 2e-6
    assert error(last, own_last) < 2e-6


def test_runs_number_the_documents_that_exist() -> None:
    segment = torch.tensor([[7, 7, -1, 7, 3, -1, 3, 4], [-1, -1, 5, 5, -1, 6, 6, -1]])
    assert runs_of(segment, segment >= 0).tolist() == [[0, 0, 0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 1, 1, 1]]
    assert runs_of(torch.tensor([[2, 2, 0, 0, 1]]), None).tolist() == [[0, 0, 1, 1, 2]]


def test_bits_do_not_depend_on_threads_or_strides(level: str) -> None:
    for h, n in ((1, 700), (2, 300), (9, 130)):
        inputs = tensors(1, h, n, 24, 100)
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(call, inputs, "native", torch.float32))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    fused = torch.randn(2, 70, 3, 4, 16)  # one projection: [B, N, qkv, H, D]
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    rate = torch.full((4,), -0.1)
    with ops.backend("native"):
        expected = ops.linear_decay(q.contiguous(), k.contiguous(), v.contiguous(), rate)[0]
        assert torch.equal(ops.linear_decay(q, k, v, rate)[0], expected)
        assert torch.equal(ops.linear_decay(q.mT.contiguous().mT, k, v, rate)[0], expected)


@given(b=st.integers(0, 2), h=st.integers(1, 3), n=st.integers(0, 150), d=st.integers(1, 40), e=st.integers(1, 70),
       chunk=st.sampled_from([None, 1, 2, 15, 16, 33, 256]), masks=st.booleans())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_random_shapes(b: int, h: int, n: int, d: int, e: int, chunk: int | None, masks: bool) -> None:
    keep = torch.rand(b, n) < 0.6 if masks else None
    segment = (torch.rand(b, n) < 0.1).cumsum(1) if masks else None

    def masked(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        return call(*inputs, key_mask=keep, segment=segment, chunk=chunk)

    assert max(errors(masked, tensors(b, h, n, d, e))) < 2e-5


def test_strong_decay_neither_underflows_into_nan_nor_leaks() -> None:
    inputs = tensors(1, 1, 200, 8, 8)
    inputs[3] = torch.tensor([-50.0], dtype=torch.float64)
    assert max(errors(call, inputs)[i] for i in (0, 1, 2, 3, 4)) < 2e-5


def test_half_precision_keeps_its_type_and_the_state_is_wide() -> None:
    q, k, v, log_decay, _ = tensors(1, 2, 80, 8, 8)
    half = [t.bfloat16() for t in (q, k, v)]
    out, last = ops.linear_decay(*half, log_decay.float())
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    exact, _ = ops.linear_decay(*(t.double() for t in half), log_decay)
    assert error(out, exact) < 1e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear_decay(q.float(), k.bfloat16(), v.float(), log_decay.float())[0].dtype == torch.bfloat16
    assert ops.linear_decay(q, k, v, log_decay)[1].dtype == torch.float64


def test_operator_contract() -> None:
    q, k, v, log_decay, state = (t.float().requires_grad_() for t in tensors(1, 2, 20, 4, 6))
    keep, packed = torch.rand(1, 20) < 0.8, torch.zeros(1, 20, dtype=torch.int32)
    torch.library.opcheck(native_linear_decay, (q, k, v, log_decay, state, keep, packed, 16, 0))
    torch.library.opcheck(native_linear_decay, (q, k, v, log_decay, None, None, None, 16, 2))
    plain = [t.detach() for t in (q, k, v, log_decay, state)]
    torch.library.opcheck(native_linear_decay_backward,
                          (*plain, keep, packed, plain[4], plain[2], plain[4], True), test_utils=("test_schema", "test_faketensor"))


class _Graph(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        return ops.linear_decay(q, k, v, log_decay, state=state, key_mask=keep)


def test_compile_and_export_keep_the_values() -> None:
    inputs = (*(t.float() for t in tensors(2, 2, 20, 4, 6)), torch.rand(2, 20) < 0.8)
    expected = _Graph()(*inputs)
    for graph in (torch.compile(_Graph(), fullgraph=True, backend="aot_eager"),):
        for a, b in zip(graph(*inputs), expected):
            torch.testing.assert_close(a, b)
    length, batch = torch.export.Dim("length", min=2, max=4096), torch.export.Dim("batch", min=1, max=64)
    along = {0: batch, 2: length}
    shapes = (along, along, along, None, {0: batch}, {0: batch, 1: length})
    program = torch.export.export(_Graph(), inputs, dynamic_shapes=shapes)
    other = (*(t.float() for t in tensors(1, 2, 131, 4, 6)), torch.rand(1, 131) < 0.8)
    other = (*other[:3], inputs[3], *other[4:])
    for a, b in zip(program.module()(*other), _Graph()(*other)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_the_twin_runs_in_onnx_runtime() -> None:
    import onnxruntime

    inputs = (*(t.float() for t in tensors(2, 2, 20, 4, 6)), torch.rand(2, 20) < 0.8)
    length, batch = torch.export.Dim("length", min=2, max=4096), torch.export.Dim("batch", min=1, max=64)
    along = {0: batch, 2: length}
    program = torch.onnx.export(_Graph(), inputs, dynamo=True, verbose=False,
                                dynamic_shapes=(along, along, along, None, {0: batch}, {0: batch, 1: length}))
    buffer = io.BytesIO()
    program.save(buffer)
    session = onnxruntime.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    other = (*(t.float() for t in tensors(1, 2, 131, 4, 6)), torch.rand(1, 131) < 0.8)
    feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), other)}
    for got, expected in zip(session.run(None, feeds), _Graph()(*other)):
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("change", "message"), [
    ({"k": torch.zeros(1, 2, 6, 4)}, "wants q, k"),
    ({"v": torch.zeros(1, 2, 5, 4, dtype=torch.float64)}, "share one floating type"),
    ({"log_decay": torch.zeros(3)}, "log_decay must be"),
    ({"state": torch.zeros(1, 2, 4, 5)}, "state must be"),
    ({"key_mask": torch.ones(1, 5)}, "key_mask must be"),
    ({"segment": torch.ones(1, 4, dtype=torch.int64)}, "segment must be"),
    ({"chunk": 300}, "chunk must be"),
    ({"log_decay": torch.tensor([0.1, 0.0])}, "log_decay must not be above 0"),
])
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"q": torch.zeros(1, 2, 5, 4), "k": torch.zeros(1, 2, 5, 4), "v": torch.zeros(1, 2, 5, 4),
                 "log_decay": torch.zeros(2)} | change
    q, k, v, log_decay = (arguments.pop(name) for name in ("q", "k", "v", "log_decay"))
    with pytest.raises(ValueError, match=message), ops.backend("native"):
        ops.linear_decay(q, k, v, log_decay, **arguments)  # type: ignore[arg-type]
