"""Sequence alignment against plain recursion and against every monotone way, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm import ops
from vlm.ops.alignment_native import native_alignment


def ways(n: int, m: int) -> list[list[tuple[int, int]]]:
    """Every monotone way from (0, 0) to (n - 1, m - 1): as many as the Delannoy number."""
    if n == 1 and m == 1:
        return [[(0, 0)]]
    before = [(n - 1, m - 1), (n - 1, m), (n, m - 1)]
    return [[*way, (n - 1, m - 1)] for a, b in before if a > 0 and b > 0 for way in ways(a, b)]


def recursion(cost: Tensor, gamma: float) -> float:
    """One pair [n, m], plain loops."""
    n, m = cost.shape
    table = [[math.inf] * (m + 1) for _ in range(n + 1)]
    table[0][0] = 0.0
    for i in range(n):
        for j in range(m):
            before = [table[i][j], table[i][j + 1], table[i + 1][j]]
            low = min(before)
            if gamma and low < math.inf:
                low -= gamma * math.log(sum(math.exp((low - x) / gamma) for x in before))
            table[i + 1][j + 1] = float(cost[i, j]) + low
    return table[n][m]


def pairs(b: int, n: int, m: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """costs, row lengths, column lengths; costs beyond the lengths are NaN."""
    g = torch.Generator().manual_seed(b * 100 + n)
    cost = torch.randn(b, n, m, generator=g, dtype=dtype)
    rows, columns = torch.randint(0, n + 1, (b,), generator=g), torch.randint(0, m + 1, (b,), generator=g)
    beyond = (torch.arange(n)[:, None] >= rows[:, None, None]) | (torch.arange(m) >= columns[:, None, None])
    return cost.masked_fill(beyond, math.nan).requires_grad_(), rows, columns


@pytest.mark.parametrize("gamma", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 1, 7), (5, 6, 1), (16, 5, 5), (17, 7, 6), (33, 4, 11)], ids=str)
def test_alignment_is_the_plain_recursion(level: str, shape: tuple[int, int, int], gamma: float) -> None:
    cost, rows, columns = pairs(*shape)
    got = ops.sequence_alignment(cost, rows, columns, gamma=gamma)
    for b in range(shape[0]):
        n, m = int(rows[b]), int(columns[b])
        assert got[b].item() == pytest.approx(recursion(cost[b, :n, :m].detach().double(), gamma), abs=1e-5, rel=1e-5)
    exact = cost.detach().double().requires_grad_()
    twin = ops.sequence_alignment_reference(exact, rows, columns, gamma=gamma)
    live = twin.isfinite()
    upstream = torch.randn(shape[0])
    (ours,) = torch.autograd.grad(got[live], cost, upstream[live])
    (theirs,) = torch.autograd.grad(twin[live], exact, upstream[live].double())
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-3)
    assert ours.isfinite().all()


@pytest.mark.parametrize("n", range(1, 6))
@pytest.mark.parametrize("m", range(1, 6))
def test_sugar_gak_is_the_sum_over_all_monotone_ways_and_dtw_their_minimum(n: int, m: int) -> None:
    k = torch.rand(n, m, dtype=torch.float64)
    every = ways(n, m)
    total = sum(math.prod(float(k[i, j]) for i, j in way) for way in every)
    least = min(sum(float(k[i, j]) for i, j in way) for way in every)
    for dtype in (torch.float64, torch.float32):
        log_kernel = k.log()[None].to(dtype)
        assert ops.log_alignment_kernel(log_kernel).exp().item() == pytest.approx(total, rel=1e-5)
        assert ops.sequence_alignment(k[None].to(dtype), gamma=0.0).item() == pytest.approx(least, rel=1e-5)


def test_sugar_gak_of_single_slices_is_the_kernel_and_the_logarithm_equals_linear_space() -> None:
    k = torch.rand(4, 1, 1)
    torch.testing.assert_close(ops.log_alignment_kernel(k.log()).exp(), k[:, 0, 0])
    # Linear space, plain recursion.
    k = torch.rand(6, 7, dtype=torch.float64)
    table = torch.zeros(7, 8, dtype=torch.float64)
    table[0, 0] = 1
    for i in range(6):
        for j in range(7):
            table[i + 1, j + 1] = k[i, j] * (table[i, j] + table[i, j + 1] + table[i + 1, j])
    got = ops.log_alignment_kernel(k.log()[None].float())
    torch.testing.assert_close(got.exp()[0].double(), table[6, 7], rtol=1e-5, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_sugar_alignment_is_symmetric(gamma: float) -> None:
    cost, rows, columns = pairs(9, 6, 8)
    there = ops.sequence_alignment(cost, rows, columns, gamma=gamma)
    back = ops.sequence_alignment(cost.transpose(1, 2), columns, rows, gamma=gamma)
    torch.testing.assert_close(there, back)


def test_a_small_gamma_approaches_dtw_from_below() -> None:
    cost, rows, columns = pairs(12, 9, 7)
    hard = ops.sequence_alignment(cost, rows, columns, gamma=0.0)
    soft = ops.sequence_alignment(cost, rows, columns, gamma=1e-3)
    torch.testing.assert_close(soft, hard, atol=2e-2, rtol=0)
    assert (soft[hard.isfinite()] <= hard[hard.isfinite()] + 1e-5).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_sugar_gradcheck_of_the_twin(gamma: float) -> None:
    cost = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    rows, columns = torch.tensor([4, 2, 3]), torch.tensor([5, 4, 1])
    assert torch.autograd.gradcheck(lambda c: ops.sequence_alignment_reference(c, rows, columns, gamma=gamma), (cost,))


def test_error_is_at_most_twice_that_of_float32_torch(level: str) -> None:
    cost = torch.randn(8, 61, 47)
    leaves = [cost.clone().requires_grad_(), cost.clone().requires_grad_(), cost.double().requires_grad_()]
    results = []
    for leaf, function in zip(leaves, (ops.sequence_alignment, ops.sequence_alignment_reference, ops.sequence_alignment_reference)):
        values = function(leaf, gamma=0.7)
        results.append([values.detach().double(), torch.autograd.grad(values.sum(), leaf)[0].double()])
    for ours, naive, exact in zip(*results):
        assert (ours - exact).abs().max() <= 2 * (naive - exact).abs().max() + 1e-7


def test_forbidden_cells_and_strides_and_threads(level: str) -> None:
    cost = torch.randn(5, 9, 4).transpose(1, 2)
    cost[2, 1] = math.inf
    cost[3, 0, 0] = math.inf
    leaf = cost.clone().requires_grad_()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        values = ops.sequence_alignment(leaf, gamma=0.3)
        results.append([values, *torch.autograd.grad(values[values.isfinite()].sum(), leaf)])
    assert all(torch.equal(a, b) for a, b in zip(*results))
    values, gradient = results[0]
    assert values.isinf().tolist() == [False, False, True, True, False]
    assert gradient.isfinite().all()
    assert not gradient[2:4].any()
    with ops.backend("torch"):
        twin = ops.sequence_alignment(leaf, gamma=0.3)
    torch.testing.assert_close(values, twin)
    torch.testing.assert_close(gradient, torch.autograd.grad(twin[twin.isfinite()].sum(), leaf)[0], atol=1e-5, rtol=1e-4)


def test_empty_problems() -> None:
    assert ops.sequence_alignment(torch.zeros(0, 3, 3)).shape == (0,)
    for dtype in (torch.float32, torch.float64):
        assert ops.sequence_alignment(torch.zeros(2, 0, 3, dtype=dtype)).tolist() == [math.inf] * 2
        lengths = torch.tensor([0, 2]), torch.tensor([0, 0])
        assert ops.sequence_alignment(torch.zeros(2, 2, 3, dtype=dtype), *lengths).tolist() == [0, math.inf]


def test_half_types_are_widened() -> None:
    cost = torch.randn(2, 5, 5)
    assert ops.sequence_alignment(cost.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(ops.sequence_alignment(cost.bfloat16()), ops.sequence_alignment(cost.bfloat16().float()))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_alignment_passes_opcheck_compiles_and_exports(tmp_path: Any) -> None:
    import onnxruntime

    cost, rows, columns = torch.randn(3, 4, 5, requires_grad=True), torch.tensor([4, 2, 1]), torch.tensor([5, 3, 5])
    torch.library.opcheck(native_alignment, (cost, rows, columns, 0.5))
    torch.library.opcheck(native_alignment, (cost, None, None, 0.0))

    def step(c: Tensor) -> Tensor:
        return ops.sequence_alignment(c, rows, columns, gamma=0.5).sum()

    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(cost), cost)[0]
    torch.testing.assert_close(got, torch.autograd.grad(step(cost), cost)[0])

    class Align(torch.nn.Module):
        def forward(self, cost: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            return ops.sequence_alignment(cost, rows, columns, gamma=0.5)

    batch = torch.export.Dim("batch", min=2)
    shapes = {"cost": {0: batch}, "rows": {0: batch}, "columns": {0: batch}}
    program = torch.export.export(Align(), (cost.detach(), rows, columns), dynamic_shapes=shapes)
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    path = tmp_path / "align.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    inputs = torch.randn(5, 4, 5), torch.tensor([1, 2, 3, 4, 4]), torch.tensor([5, 1, 2, 4, 5])
    (found,) = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), inputs)})
    torch.testing.assert_close(torch.from_numpy(found), Align()(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cost": torch.zeros(3, 3)}, "wants floating costs"),
        ({"gamma": -1.0}, "gamma must be"),
        ({"gamma": math.inf}, "gamma must be"),
        ({"row_lengths": torch.tensor([4])}, "row_lengths must be in"),
        ({"column_lengths": torch.tensor([1.0])}, "column_lengths must be integers"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.sequence_alignment(**{"cost": torch.zeros(1, 3, 3), **arguments})


@settings(max_examples=25, deadline=None)
@given(b=st.integers(1, 20), n=st.integers(1, 8), m=st.integers(1, 8), gamma=st.sampled_from([0.0, 0.2, 1.0]))
def test_alignment_property(b: int, n: int, m: int, gamma: float) -> None:
    cost, rows, columns = pairs(b, n, m)
    got = ops.sequence_alignment(cost, rows, columns, gamma=gamma).tolist()
    for k in range(b):
        expected = recursion(cost[k, : int(rows[k]), : int(columns[k])].detach().double(), gamma)
        assert got[k] == pytest.approx(expected, abs=1e-4, rel=1e-4)
