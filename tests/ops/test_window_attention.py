"""Windowed attention: the native kernel and the twin against a dense float64 oracle over all pairs of the map."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error, errors, run
from vlm import ops
from vlm.export.graphs import export_part
from vlm.ops.window_attention_native import native_window_attention
from vlm.ops.window_attention_reference import window_partition, window_regions, window_reverse
from vlm.types.export import ExportPart

Shape = tuple[int, int, int, int, int]  # maps, rows, columns, heads, head width


def tensors(shape: Shape, window: tuple[int, int]) -> list[Tensor]:
    b, rows, columns, heads, width = shape
    table = torch.randn((2 * window[0] - 1) * (2 * window[1] - 1), heads, dtype=torch.float64)
    qkv = torch.randn(b, rows, columns, 3 * heads * width, dtype=torch.float64)
    return [qkv, torch.rand(heads, dtype=torch.float64) * 8 + 1, table]


def dense(qkv: Tensor, tau: Tensor, table: Tensor, window: tuple[int, int], shift: tuple[int, int]) -> Tensor:
    """All pairs of the map, allowed if they share a window after the roll and the region of the book's three slices per
    axis: [0, -window), [-window, -shift), [-shift, end) of the padded, rolled map. Nothing shared with the code under test."""
    b, rows, columns, channels = qkv.shape
    heads = tau.shape[0]
    height, width = math.ceil(rows / window[0]) * window[0], math.ceil(columns / window[1]) * window[1]

    def slice_of(place: int, size: int, w: int, s: int) -> int:
        return 0 if s == 0 or place < size - w else 1 if place < size - s else 2

    owner, inside = {}, {}
    for y, x in itertools.product(range(rows), range(columns)):
        ry, rx = (y - shift[0]) % height, (x - shift[1]) % width
        region = slice_of(ry, height, window[0], shift[0]), slice_of(rx, width, window[1], shift[1])
        owner[y, x] = (ry // window[0], rx // window[1], *region)
        inside[y, x] = (ry % window[0], rx % window[1])
    places = list(owner)
    q, k, v = qkv.reshape(b, rows * columns, 3, heads, -1).permute(2, 0, 3, 1, 4)
    cos = (q / q.norm(dim=-1, keepdim=True).clamp(min=1e-12)) @ (k / k.norm(dim=-1, keepdim=True).clamp(min=1e-12)).mT
    allow = torch.tensor([[owner[i] == owner[j] for j in places] for i in places])
    index = torch.tensor([[
        (inside[i][0] - inside[j][0] + window[0] - 1) * (2 * window[1] - 1) + inside[i][1] - inside[j][1] + window[1] - 1
        if owner[i] == owner[j] else 0 for j in places] for i in places])  # fmt: skip
    logits = tau[:, None, None] * cos + table[index].permute(2, 0, 1)
    p = logits.masked_fill(~allow, -math.inf).softmax(-1)
    return (p @ v).transpose(1, 2).reshape(b, rows, columns, channels // 3)


CASES: list[tuple[Shape, tuple[int, int], tuple[int, int]]] = [
    ((2, 8, 8, 2, 16), (4, 4), (0, 0)),
    ((2, 8, 8, 2, 16), (4, 4), (2, 2)),
    ((1, 8, 12, 3, 5), (4, 3), (1, 2)),
    ((1, 4, 4, 1, 32), (4, 4), (0, 0)),
    ((2, 7, 9, 2, 8), (4, 4), (2, 2)),  # padded on both sides
    ((1, 5, 13, 1, 17), (3, 5), (0, 4)),
    ((1, 1, 1, 1, 1), (1, 1), (0, 0)),
    ((1, 1, 6, 2, 4), (4, 4), (3, 3)),  # less of the map than the shift
    ((1, 2, 3, 1, 8), (7, 7), (3, 3)),
    ((1, 18, 18, 1, 24), (17, 17), (8, 8)),  # 289 positions: more than a tile
    ((1, 16, 16, 2, 33), (16, 16), (0, 0)),  # exactly a tile
    ((9, 8, 4, 1, 8), (4, 4), (2, 1)),  # more than a block of windows
]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_swin_v2_shifted_attention_equals_a_dense_oracle_of_window_and_region(case, backend) -> None:
    shape, window, shift = case
    inputs = tensors(shape, window)

    def ours(qkv: Tensor, tau: Tensor, table: Tensor) -> tuple[Tensor]:
        return (ops.window_attention(qkv, tau, table, window=window, shift=shift),)

    def oracle(qkv: Tensor, tau: Tensor, table: Tensor) -> tuple[Tensor]:
        return (dense(qkv, tau, table, window, shift),)

    exact = run(oracle, inputs, "torch", torch.float64)
    for got, wanted in zip(run(ours, inputs, backend, torch.float32), exact):
        assert error(got, wanted) < 1e-5
    for got, wanted in zip(run(ours, inputs, "torch", torch.float64), exact):
        assert error(got, wanted) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_level_has_the_values_and_gradients_of_float64(case, level: str) -> None:
    shape, window, shift = case
    assert max(errors(lambda *t: (ops.window_attention(*t, window=window, shift=shift),), tensors(shape, window))) < 1e-5


@given(b=st.integers(0, 2), rows=st.integers(0, 11), columns=st.integers(0, 11), heads=st.integers(1, 3), width=st.integers(2, 20),
       wh=st.integers(1, 6), ww=st.integers(1, 6), data=st.data())  # fmt: skip
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_shapes(b, rows, columns, heads, width, wh, ww, data) -> None:
    shift = data.draw(st.integers(0, wh - 1)), data.draw(st.integers(0, ww - 1))
    inputs = tensors((b, rows, columns, heads, width), (wh, ww))

    def ours(*t: Tensor) -> tuple[Tensor]:
        return (ops.window_attention(*t, window=(wh, ww), shift=shift),)

    # Of a region of one position every gradient but that of v is 0, so what is left is compared with 1.
    for got, exact in zip(run(ours, inputs, "native", torch.float32), run(ours, inputs, "torch", torch.float64)):
        assert got.shape == exact.shape
        if exact.numel():
            assert (got - exact).abs().max() < 3e-4 * exact.abs().max().clamp(min=1)


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    inputs = tensors((2, 32, 32, 4, 32), (8, 8))

    def ours(*t: Tensor) -> tuple[Tensor]:
        return (ops.window_attention(*t, window=8, shift=4),)

    for mine, theirs in zip(errors(ours, inputs), errors(ours, inputs, "torch")):
        assert mine <= 2 * theirs + 1e-7


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("part", [0, 1], ids=["queries", "keys"])
def test_swin_v2_output_does_not_change_with_the_length_of_queries_or_keys(backend, part) -> None:
    qkv, tau, table = (t.float() for t in tensors((1, 8, 8, 2, 16), (4, 4)))
    scaled = qkv.clone()
    scaled[..., 32 * part : 32 * part + 32] *= 2.0**7  # a power of two, so that not even a rounding differs
    with ops.backend(backend):
        one, two = (ops.window_attention(x, tau, table, window=4, shift=2) for x in (qkv, scaled))
    assert torch.equal(one, two)


def test_swin_v2_partition_and_its_inverse_are_the_identity_also_when_rolled() -> None:
    x = torch.randn(2, 8, 12, 5)
    there = window_partition(torch.roll(x, (-2, -1), (1, 2)), (4, 3))
    assert torch.equal(torch.roll(window_reverse(there, (4, 3), (8, 12)), (2, 1), (1, 2)), x)
    assert torch.equal(window_reverse(window_partition(x, (8, 2)), (8, 2), (8, 12)), x)


def test_swin_v2_at_most_four_regions_and_none_without_a_shift() -> None:
    assert int(window_regions((8, 8), (4, 4), (0, 0)).max()) == 0
    regions = window_regions((8, 8), (4, 4), (2, 2))
    assert [len(row.unique()) for row in regions] == [1, 2, 2, 4]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_zero_vectors_have_finite_gradients(backend) -> None:
    inputs = tensors((1, 4, 4, 1, 8), (4, 4))
    inputs[0][0, 1, 2] = 0
    for got in run(lambda *t: (ops.window_attention(*t, window=4),), inputs, backend, torch.float32):
        assert got.isfinite().all()


def test_any_strides_give_the_same_bits() -> None:
    qkv, tau, table = (t.float() for t in tensors((2, 6, 10, 2, 16), (4, 4)))
    wide = torch.randn(2, 10, 6, 100)
    wide[..., :96] = qkv.transpose(1, 2)
    upstream = torch.randn(2, 6, 10, 32)
    results = []
    for given_qkv in (qkv, wide[..., :96].transpose(1, 2)):
        leaf = given_qkv.detach().requires_grad_()
        with ops.backend("native"):
            out = ops.window_attention(leaf, tau, table, window=4, shift=1)
        for given_upstream in (upstream, upstream.mT.contiguous().mT):
            results.append((out, *torch.autograd.grad(out, leaf, given_upstream, retain_graph=True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_bits_do_not_depend_on_the_thread_count(level: str) -> None:
    inputs = tensors((5, 14, 18, 3, 16), (4, 4))
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(lambda *t: (ops.window_attention(*t, window=4, shift=2),), inputs, "native", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_positions_beyond_the_map_are_not_read() -> None:
    """The last rows of a larger buffer hold NaN, and the map ends before them."""
    inputs = tensors((1, 6, 6, 2, 8), (4, 4))
    buffer = torch.full((1, 8, 8, 48), math.nan)
    buffer[:, :6, :6] = inputs[0].float()
    with ops.backend("native"):
        inside = ops.window_attention(buffer[:, :6, :6], inputs[1].float(), inputs[2].float(), window=4, shift=2)
    assert inside.isfinite().all()


def test_gradients_of_the_twin() -> None:
    leaves = [t.requires_grad_() for t in tensors((1, 5, 4, 2, 3), (3, 2))]
    with ops.backend("torch"):
        assert torch.autograd.gradcheck(lambda *t: ops.window_attention(*t, window=(3, 2), shift=(1, 1)), leaves)


def test_half_precision_and_autocast_return_the_type_given() -> None:
    qkv, tau, table = (t.float() for t in tensors((1, 8, 8, 2, 16), (4, 4)))
    expected = ops.window_attention(qkv, tau, table, window=4, shift=2)
    for backend in ("native", "torch"):
        with ops.backend(backend), torch.autocast("cpu", torch.bfloat16):
            got = ops.window_attention(qkv.bfloat16(), tau, table, window=4, shift=2)
        assert got.dtype == torch.bfloat16
        assert error(got.float(), expected) < 2e-2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qkv": (1, 4, 4, 25)}, "no multiple"),
        ({"qkv": (4, 4, 24)}, "wants qkv"),
        ({"table": (48, 2)}, r"expected \(49, 2\)"),
        ({"window": 0}, "expected 0 <= shift"),
        ({"shift": 4}, "expected 0 <= shift"),
        ({"shift": -1}, "expected 0 <= shift"),
    ],
)
def test_what_does_not_fit_is_refused(change, words) -> None:
    qkv, table = torch.zeros(change.get("qkv", (1, 4, 4, 24))), torch.zeros(change.get("table", (49, 2)))
    with pytest.raises(ValueError, match=words):
        ops.window_attention(qkv, torch.ones(2), table, window=change.get("window", 4), shift=change.get("shift", 0))


def test_it_passes_opcheck() -> None:
    qkv, tau, table = (t.float().requires_grad_() for t in tensors((2, 5, 6, 2, 8), (4, 4)))
    torch.library.opcheck(native_window_attention, (qkv, tau, table, [4, 4], [2, 1]))


class Attend(torch.nn.Module):
    def forward(self, qkv: Tensor, tau: Tensor, table: Tensor) -> Tensor:
        return ops.window_attention(qkv, tau, table, window=4, shift=2)


def test_it_compiles_as_one_graph_forward_and_backward() -> None:
    inputs = [t.float().requires_grad_() for t in tensors((2, 6, 8, 2, 8), (4, 4))]
    compiled = torch.compile(Attend(), fullgraph=True, backend="aot_eager")
    with ops.backend("native"):
        expected = torch.autograd.grad(Attend()(*inputs).square().sum(), inputs)
        got = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


def test_it_exports_to_torch_and_onnx(tmp_path) -> None:
    import onnxruntime

    inputs = tuple(t.float() for t in tensors((2, 7, 8, 2, 8), (4, 4)))
    expected = Attend()(*inputs)
    program = torch.export.export(Attend(), inputs, dynamic_shapes=({0: torch.export.Dim("batch")}, None, None))
    torch.testing.assert_close(program.module()(*inputs), expected)
    path = tmp_path / "window.onnx"
    named = dict(zip(("qkv", "tau", "table"), inputs))
    export_part("window", ExportPart(Attend().eval(), named, {"qkv": {0: "batch"}}, ["out"]), path, opset=18)
    session = onnxruntime.InferenceSession(path)
    for batch in (1, 3):
        qkv = torch.randn(batch, *inputs[0].shape[1:])
        got = session.run(None, {"qkv": qkv.numpy(), "tau": inputs[1].numpy(), "table": inputs[2].numpy()})[0]
        assert error(torch.from_numpy(got), Attend()(qkv, *inputs[1:]).double()) < 1e-5
