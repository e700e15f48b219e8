"""Contrastive losses: tiled kernels and twins against the textbook form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.oracle import error, errors, run
from vlm import ops


def pair(rows: int, columns: int, width: int) -> list[Tensor]:
    x, y = torch.randn(rows, width, dtype=torch.float64), torch.randn(columns, width, dtype=torch.float64)
    return [F.normalize(x, dim=1), F.normalize(y, dim=1), torch.tensor(2.3, dtype=torch.float64)]


@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("size", [1, 63, 64, 65, 1000])
def test_core_infonce_is_symmetric_cross_entropy(size: int, backend: ops.Backend) -> None:
    inputs = pair(size, size, 24)

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor]:
        rows, columns = ops.contrastive_softmax(x, y, s)
        return ((rows.mean() + columns.mean()) / 2,)

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor]:
        z, labels = s.exp() * x @ y.T, torch.arange(size)
        return ((F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2,)

    dtype, limit = (torch.float32, 1e-5) if backend == "native" else (torch.float64, 1e-12)
    for got, exact in zip(run(ours, inputs, backend, dtype), run(textbook, inputs, "torch", torch.float64)):
        torch.testing.assert_close(got.double(), exact, rtol=limit, atol=limit)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_siglip_is_the_loss_over_all_pairs(backend: ops.Backend) -> None:
    inputs = [*pair(65, 65, 24), torch.tensor(-3.0, dtype=torch.float64)]

    def ours(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor]:
        return (ops.contrastive_sigmoid(x, y, s, b)[0].mean(),)

    def textbook(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor]:
        return (-F.logsigmoid((s.exp() * x @ y.T + b) * (2 * torch.eye(65) - 1)).sum() / 65,)

    dtype = torch.float32 if backend == "native" else torch.float64
    for got, exact in zip(run(ours, inputs, backend, dtype), run(textbook, inputs, "torch", torch.float64)):
        assert error(got, exact) < (1e-5 if backend == "native" else 1e-12)


def test_core_infonce_group_targets_are_a_uniform_distribution_over_the_group() -> None:
    inputs = pair(30, 40, 16)
    gx, gy = torch.randint(0, 9, (30,)), torch.randint(2, 12, (40,))
    match = (gx[:, None] == gy[None, :]).double()

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ops.contrastive_softmax(x, y, s, groups_x=gx, groups_y=gy)

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z = s.exp() * x @ y.T
        values = []
        for logits, target in ((z, match), (z.T, match.T)):
            count = target.sum(1, keepdim=True)
            share = torch.where(count > 0, target / count.clamp(min=1), 0.0)
            values.append(-(share * F.log_softmax(logits, 1)).sum(1))
        return values[0], values[1]

    for got, exact in zip(run(ours, inputs, "native", torch.float32), run(textbook, inputs, "torch", torch.float64)):
        assert error(got, exact) < 1e-5


SIZES = [(1, 1, 1), (5, 5, 3), (63, 63, 16), (64, 64, 33), (65, 65, 64), (113, 257, 20), (700, 300, 40), (0, 4, 4), (4, 0, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_matches_the_float64_twin(size: tuple[int, int, int], level: str) -> None:
    rows, columns, width = size
    inputs = pair(rows, columns, width)
    bias = torch.tensor(-3.0, dtype=torch.float64)
    gx, gy = torch.randint(-2, rows // 2 + 2, (rows,)), torch.randint(-2, rows // 2 + 2, (columns,))
    for grouped, offset in itertools.product((False, True), (0, 3)):
        kw = {"groups_x": gx, "groups_y": gy} if grouped else {"row_offset": offset}

        def softmax(x: Tensor, y: Tensor, s: Tensor, kw=kw) -> tuple[Tensor, Tensor]:
            return ops.contrastive_softmax(x, y, s, **kw)

        def sigmoid(x: Tensor, y: Tensor, s: Tensor, b: Tensor, kw=kw) -> tuple[Tensor, Tensor]:
            return ops.contrastive_sigmoid(x, y, s, b, **kw)

        *most, scale = errors(softmax, inputs)
        assert max(most) < 1e-5
        *most, scale_2, shift = errors(sigmoid, [*inputs, bias])
        assert max(most) < 1e-5
        # Sums of thousands of terms of either sign: compared with what was summed, not with what is left.
        assert max(scale, scale_2, shift) < 2e-3


def test_error_is_at_most_twice_that_of_torch_in_the_same_type() -> None:
    inputs = pair(300, 300, 64)
    inputs[2] = torch.tensor(math.log(100.0), dtype=torch.float64)

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor]:
        rows, columns = ops.contrastive_softmax(x, y, s)
        return ((rows + columns).mean(),)

    for mine, theirs in zip(errors(ours, inputs), errors(ours, inputs, "torch")):
        assert mine <= 2 * theirs + 2e-7


def test_local_rows_against_gathered_columns_add_up_to_the_whole() -> None:
    """What two ranks compute: row values with an offset, and the other direction with roles swapped."""
    x, y, s = (t.float() for t in pair(40, 40, 16))
    with ops.backend("native"):
        rows, columns = ops.contrastive_softmax(x, y, s)
        parts = [ops.contrastive_softmax(x[a : a + 20], y, s, row_offset=a)[0] for a in (0, 20)]
        others = [ops.contrastive_softmax(y[a : a + 20], x, s, row_offset=a)[0] for a in (0, 20)]
        sigmoid = ops.contrastive_sigmoid(x, y, s, torch.tensor(-1.0))[0]
        halves = [ops.contrastive_sigmoid(x[a : a + 20], y, s, torch.tensor(-1.0), row_offset=a)[0] for a in (0, 20)]
    torch.testing.assert_close(torch.cat(parts), rows)
    torch.testing.assert_close(torch.cat(others), columns)
    torch.testing.assert_close(torch.cat(halves), sigmoid)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_rows_without_a_positive_have_no_value_and_no_gradient(backend: ops.Backend) -> None:
    inputs = pair(6, 6, 8)
    gx = torch.tensor([0, 1, 2, 3, 4, 5])
    gy = torch.tensor([0, 0, 0, 0, 0, 9])

    def rows_only(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor]:
        return (ops.contrastive_softmax(x, y, s, groups_x=gx, groups_y=gy)[0],)

    rows, dx, _, _ = run(rows_only, inputs, backend, torch.float32)
    assert (rows[1:] == 0).all()
    assert rows[0] > 0
    assert (dx[1:] == 0).all()
    assert dx[0].abs().sum() > 0


def test_extreme_scales_stay_finite() -> None:
    x, y, _ = pair(50, 50, 8)
    for scale in (0.0, 1e-3, 100.0, 1e4):
        log_scale = torch.tensor(math.log(scale) if scale else -100.0)

        def both(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            return (*ops.contrastive_softmax(x, y, s), *ops.contrastive_sigmoid(x, y, s, torch.zeros(())))

        assert all(t.isfinite().all() for t in run(both, [x, y, log_scale], "native", torch.float32))


@pytest.mark.parametrize("size", [(150, 150, 16), (1200, 300, 8)], ids=str)
def test_bits_do_not_depend_on_the_thread_count(size: tuple[int, int, int], level: str) -> None:
    inputs = [*pair(*size), torch.tensor(-1.0)]

    def both(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (*ops.contrastive_softmax(x, y, s), *ops.contrastive_sigmoid(x, y, s, b))

    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(run(both, inputs, "native", torch.float32))
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)


def test_strides_do_not_matter() -> None:
    x, y, s = (t.float() for t in pair(40, 50, 16))
    wide = torch.zeros(40, 29)
    wide[:, 5:21] = x
    with ops.backend("native"):
        expected = ops.contrastive_softmax(x, y, s)
        for view in (wide[:, 5:21], x.T.contiguous().T):
            for a, b in zip(ops.contrastive_softmax(view, y, s), expected):
                assert torch.equal(a, b)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, y, s = (t.float() for t in pair(40, 40, 16))
    x.requires_grad_()
    with ops.backend("native"):
        rows, _ = ops.contrastive_softmax(x, y, s)
    rows.sum().backward()
    assert x.grad is not None
    assert y.grad is None
    assert s.grad is None


def test_bfloat16_embeddings_are_widened_even_under_autocast() -> None:
    x, y, s = pair(30, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        rows, _ = ops.contrastive_softmax(x.bfloat16(), y.bfloat16(), s.float())
    exact, _ = ops.contrastive_softmax(x.bfloat16().double(), y.bfloat16().double(), s)
    assert rows.dtype == torch.float32
    assert error(rows, exact) < 1e-5


@pytest.mark.parametrize(("change", "message"), [
    ({"y": torch.zeros(4, 9)}, "wants x"),
    ({"y": torch.zeros(4, 8, dtype=torch.float64)}, "share one floating type"),
    ({"log_scale": torch.zeros(2)}, "must be a scalar"),
    ({"groups_y": torch.zeros(4, dtype=torch.long)}, "without groups_x"),
    ({"groups_x": torch.zeros(3, dtype=torch.long)}, "must be integer ids"),
    ({"groups_x": torch.zeros(4)}, "must be integer ids"),
])
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(4, 8), "y": torch.zeros(4, 8), "log_scale": torch.zeros(())} | change
    with pytest.raises(ValueError, match=message):
        ops.contrastive_softmax(**arguments)  # type: ignore[arg-type]
