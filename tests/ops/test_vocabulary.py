"""Losses over the vocabulary against float64 autograd on all logits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.ops.vocabulary_chunks import chunked_cross_entropy

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"smoothing": 0.1},
    "z-loss": {"z_loss": 1e-3},
    "capped": {"softcap": 4.0},
    "all": {"smoothing": 0.2, "z_loss": 1e-3, "softcap": 6.0},
}
SHAPES = [(1, 1, 1), (3, 2, 2), (5, 7, 15), (8, 16, 16), (9, 5, 17), (31, 24, 301), (4, 3, 1025)]


def factors(n: int, c: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, labels with every fifth one ignored."""
    generator = torch.Generator().manual_seed(n * 1000 + v)
    hidden, weight, bias = (torch.randn(shape, generator=generator, dtype=dtype) for shape in ((n, c), (v, c), (v,)))
    labels = torch.randint(0, v, (n,), generator=generator)
    labels[3::5] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def brute_force(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, smoothing: float = 0.0, z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """float64, written as torch users write it."""
    z = hidden.double() @ weight.double().T + (0 if bias is None else bias.double())
    z = softcap * torch.tanh(z / softcap) if softcap else z
    loss = F.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
    return loss + torch.where(labels != -100, z_loss * z.logsumexp(1).square(), 0.0)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("upstream", ["uniform", "of its own"])
def test_core_ce_is_cross_entropy_of_all_logits(level: str, shape: tuple[int, int, int], options: dict[str, Any], upstream: str) -> None:
    hidden, weight, bias, labels = factors(*shape)
    leaves = [hidden, weight, bias]
    expected = brute_force(hidden, weight, bias, labels, **options)
    got = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=2 * shape[2], **options)
    torch.testing.assert_close(got.loss.double(), expected, atol=2e-5, rtol=1e-5)
    weights = torch.full((shape[0],), 0.7) if upstream == "uniform" else torch.randn(shape[0])
    for a, b in zip(
        torch.autograd.grad(got.loss, leaves, weights), torch.autograd.grad(expected, leaves, weights.double())
    ):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    used = labels != -100
    nats = F.cross_entropy(hidden.double() @ weight.double().T + bias.double(), labels, reduction="none")
    if not options.get("softcap"):
        torch.testing.assert_close(-got.log_p[used].double(), nats[used], atol=2e-5, rtol=1e-5)
    assert not got.log_p[~used].any()
    assert not got.lse[~used].any()


def test_core_ce_error_is_at_most_twice_that_of_naive_float32(level: str) -> None:
    hidden, weight, bias, labels = factors(64, 48, 3001)
    leaves = [hidden, weight, bias]

    def error(loss: Tensor) -> list[float]:
        exact = brute_force(hidden, weight, bias, labels)
        found = [loss, *torch.autograd.grad(loss.sum(), leaves)]
        wanted = [exact, *torch.autograd.grad(exact.sum(), leaves)]
        return [float((a.double() - b.double()).detach().abs().max()) for a, b in zip(found, wanted)]

    ours = error(ops.linear_cross_entropy(hidden, weight, labels, bias=bias, chunk=7 * 3001).loss)
    naive = error(F.cross_entropy(hidden @ weight.T + bias, labels, reduction="none"))
    assert all(a <= 2 * b + 1e-7 for a, b in zip(ours, naive)), (ours, naive)


@pytest.mark.parametrize("schedule", ["forward", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_core_ce_reductions_and_token_weights(schedule: Any, reduction: Any) -> None:
    hidden, weight, _, labels = factors(23, 9, 77)
    weights = torch.rand(23)
    weights[3] = math.nan  # an ignored row's weight is not read
    got = ops.linear_cross_entropy(
        hidden, weight, labels, token_weights=weights, reduction=reduction, gradients=schedule, chunk=500
    )
    used = labels != -100
    each = brute_force(hidden, weight, None, labels)[used] * weights[used].double()
    expected = each.sum() / (weights[used].double().sum() if reduction == "mean" else 1)
    torch.testing.assert_close(got.loss.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got.loss, [hidden, weight]), torch.autograd.grad(expected, [hidden, weight])):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_core_ce_with_all_labels_ignored_is_zero_and_has_no_gradient() -> None:
    hidden, weight, bias, labels = factors(5, 3, 8)
    for reduction in ("none", "mean", "sum"):
        ignored = torch.full_like(labels, -100)
        loss = ops.linear_cross_entropy(hidden, weight, ignored, bias=bias, reduction=reduction).loss  # type: ignore[arg-type]
        assert not loss.any()
        for gradient in torch.autograd.grad(loss.sum(), [hidden, weight, bias]):
            assert not gradient.any()


def test_core_ce_does_not_depend_on_the_chunk() -> None:
    hidden, weight, bias, labels = factors(37, 11, 203)
    whole = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="mean").loss
    expected = torch.autograd.grad(whole, [hidden, weight, bias])
    for chunk in (1, 203, 204, 7 * 203, 36 * 203):
        loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, reduction="mean", chunk=chunk).loss
        torch.testing.assert_close(loss, whole)
        for a, b in zip(torch.autograd.grad(loss, [hidden, weight, bias]), expected):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_core_ce_of_no_rows() -> None:
    hidden, weight, labels = torch.zeros(0, 4, requires_grad=True), torch.randn(6, 4, requires_grad=True), torch.zeros(0).long()
    loss = ops.linear_cross_entropy(hidden, weight, labels, reduction="mean").loss
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, weight)[0].any()


def test_ignored_rows_and_removed_ids_are_never_read() -> None:
    hidden, weight, bias, labels = factors(12, 5, 40)
    allowed = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.6
    allowed[labels[labels >= 0]] = True
    assert not allowed.all()
    with torch.no_grad():
        z = (hidden @ weight.T + bias).masked_fill(~allowed, -math.inf)
        expected = F.cross_entropy(z, labels, reduction="none")
        hidden[labels < 0] = math.nan
        weight[~allowed] = math.nan
        bias[~allowed] = math.nan
    loss = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, allowed=allowed).loss
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss.sum(), [hidden, weight, bias])
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][labels < 0].any()
    assert not gradients[1][~allowed].any()


def test_a_span_of_a_vocabulary_layout_is_a_smaller_vocabulary() -> None:
    from vlm.types.vocabulary import Span, VocabularyLayout

    hidden, weight, bias, _ = factors(9, 5, 40)
    layout = VocabularyLayout({"text": Span(0, 25), "image_code": Span(25, 40)})
    codes = torch.randint(0, 15, (9,), generator=torch.Generator().manual_seed(2))
    kwargs: dict[str, Any] = {"smoothing": 0.1}
    loss = ops.linear_cross_entropy(hidden, weight, codes + 25, bias=bias, allowed=layout.allowed("image_code"), **kwargs).loss
    torch.testing.assert_close(loss, ops.linear_cross_entropy(hidden, weight[25:], codes, bias=bias[25:], **kwargs).loss)
    with ops.backend("torch"):
        twin = ops.linear_cross_entropy(hidden, weight, codes + 25, bias=bias, allowed=layout.allowed("image_code"), **kwargs).loss
    torch.testing.assert_close(loss, twin)
    with pytest.raises(ValueError, match="not among the allowed ids"):
        ops.linear_cross_entropy(hidden, weight, codes, bias=bias, allowed=layout.allowed("image_code"))


def test_core_ce_of_strided_inputs_and_frozen_parts() -> None:
    hidden, weight, _, labels = factors(13, 6, 50)
    wide = torch.stack([hidden, hidden], 2).detach()[..., 0].requires_grad_()
    turned = weight.detach().T.contiguous().T
    expected = torch.autograd.grad(brute_force(hidden, weight, None, labels).sum(), hidden)[0]
    got = torch.autograd.grad(ops.linear_cross_entropy(wide, turned, labels).loss.sum(), wide)[0]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    # Only the weight learns.
    loss = ops.linear_cross_entropy(hidden.detach(), weight, labels).loss.sum()
    expected = torch.autograd.grad(brute_force(hidden, weight, None, labels).sum(), weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], expected, atol=1e-5, rtol=1e-4)


def test_a_tied_embedding_gets_both_gradients() -> None:
    table = torch.randn(30, 8, requires_grad=True)
    ids, labels = torch.randint(0, 30, (12,)), torch.randint(0, 30, (12,))
    ours = torch.autograd.grad(ops.linear_cross_entropy(table[ids].tanh(), table, labels, reduction="mean").loss, table)[0]
    expected = torch.autograd.grad(F.cross_entropy(table[ids].tanh() @ table.T, labels), table)[0]
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_gradients_of_a_retained_graph_are_right_twice() -> None:
    hidden, weight, _, labels = factors(13, 6, 50)
    loss = ops.linear_cross_entropy(hidden, weight, labels).loss
    first = torch.autograd.grad(loss.sum(), [hidden, weight], retain_graph=True)
    again = torch.autograd.grad(2 * loss.sum(), [hidden, weight])
    for a, b in zip(first, again):
        torch.testing.assert_close(2 * a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_multiplied_as_they_are(dtype: torch.dtype) -> None:
    hidden, weight, bias, labels = factors(20, 16, 90)
    low = [t.detach().to(dtype).requires_grad_() for t in (hidden, weight, bias)]
    loss = ops.linear_cross_entropy(low[0], low[1], labels, bias=low[2], reduction="mean").loss
    assert loss.dtype == torch.float32
    exact = brute_force(*low, labels).sum() / (labels >= 0).sum()
    torch.testing.assert_close(loss.double(), exact, atol=2e-2, rtol=2e-2)
    for a, b in zip(torch.autograd.grad(loss, low), torch.autograd.grad(exact, low)):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


def test_autocast_multiplies_in_its_type_and_collects_in_float32() -> None:
    hidden, weight, _, labels = factors(20, 16, 90)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, labels, reduction="mean").loss
    gradients = torch.autograd.grad(loss, [hidden, weight])
    exact = brute_force(hidden, weight, None, labels).sum() / (labels >= 0).sum()
    assert loss.dtype == torch.float32
    assert 0 < abs(loss.item() - exact.item()) < 2e-2
    for a, b in zip(gradients, torch.autograd.grad(exact, [hidden, weight])):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_float64_takes_the_chunked_operator_in_torch_and_agrees_with_the_twin(options: dict[str, Any]) -> None:
    hidden, weight, bias, labels = factors(11, 6, 50, torch.float64)
    weights = torch.rand(11, dtype=torch.float64)
    got = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weights=weights, chunk=150, **options)
    with ops.backend("torch"):
        twin = ops.linear_cross_entropy(hidden, weight, labels, bias=bias, token_weights=weights, **options)
    for a, b in zip(got, twin):
        torch.testing.assert_close(a, b)
    upstream = torch.randn(11, dtype=torch.float64)
    leaves = [hidden, weight, bias]
    for a, b in zip(torch.autograd.grad(got.loss, leaves, upstream), torch.autograd.grad(twin.loss, leaves, upstream)):
        torch.testing.assert_close(a, b)


def test_gradcheck_of_the_twin() -> None:
    hidden, weight, bias, labels = factors(6, 3, 7, torch.float64)

    def twin(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear_cross_entropy_reference(h, w, labels, bias=b, smoothing=0.1, z_loss=0.01, softcap=3.0).loss

    assert torch.autograd.gradcheck(twin, (hidden, weight, bias))


def test_core_ce_rows_have_the_same_bits_for_any_number_of_threads(level: str) -> None:
    from vlm.ops.vocabulary_rows import Shape, cross_entropy_rows

    given_chunk, labels = torch.randn(37, 1031), torch.randint(0, 1031, (37,))

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        chunk = given_chunk.clone()
        return [chunk, *cross_entropy_rows(chunk, None, labels, None, Shape(0.1, 1e-3, 0.0), gradient=True, native=True)]

    for a, b in zip(run(1), run(2)):
        assert torch.equal(a, b)


def test_core_ce_passes_opcheck() -> None:
    hidden, weight, bias, labels = factors(6, 5, 9)
    labels = labels.clamp(min=-1)
    options = (0.1, 1e-3, 0.0, 20, torch.float32, True)
    torch.library.opcheck(chunked_cross_entropy, (hidden, weight, bias, labels, torch.rand(6), *options, True, True, True))
    torch.library.opcheck(chunked_cross_entropy, (hidden, weight, None, labels, None, *options, False, False, False))


def test_core_ce_compiles_as_one_graph() -> None:
    hidden, weight, bias, labels = factors(12, 6, 50)

    def step(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear_cross_entropy(h, w, labels, bias=b, smoothing=0.1, reduction="mean").loss

    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(step(*leaves), leaves)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves), leaves)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


class Loss(torch.nn.Module):
    def forward(self, hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, smoothing=0.1, reduction="mean").loss


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_export_takes_the_twin_and_onnxruntime_agrees(tmp_path: Any) -> None:
    import onnxruntime

    hidden, weight, _, labels = factors(7, 5, 20)
    example = (hidden.detach(), weight.detach(), labels)
    rows = torch.export.Dim("rows", min=2)
    shapes = {"hidden": {0: rows}, "weight": {}, "labels": {0: rows}}
    program = torch.export.export(Loss(), example, dynamic_shapes=shapes)
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    path = tmp_path / "loss.onnx"
    torch.onnx.export(program, dynamo=True, opset_version=18, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    hidden, weight, _, labels = (t.detach() for t in factors(11, 5, 20))
    inputs = {i.name: t.numpy() for i, t in zip(session.get_inputs(), (hidden, weight, labels))}
    (got,) = session.run(None, inputs)
    torch.testing.assert_close(torch.from_numpy(got), Loss()(hidden, weight, labels), atol=1e-5, rtol=1e-5)


def test_double_backward_is_refused() -> None:
    hidden, weight, _, labels = factors(6, 5, 9)
    (gradient,) = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels).loss.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 9])}, "labels must be in"),
        ({"labels": torch.tensor([0, -1])}, "labels must be in"),
        ({"labels": torch.tensor([0.0, 1.0])}, "labels must be integers"),
        ({"weight": torch.zeros(9, 4)}, "wants hidden"),
        ({"weight": torch.zeros(0, 3)}, "vocabulary is empty"),
        ({"bias": torch.zeros(8)}, "bias must be"),
        ({"smoothing": 1.0}, "smoothing must be"),
        ({"token_weights": torch.zeros(3)}, "token_weights must be"),
        ({"allowed": torch.zeros(9)}, "allowed must be"),
        ({"reduction": "max"}, "unknown reduction"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(9, 3), "labels": torch.tensor([0, 1]), **change}
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(**arguments)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(0, 20), c=st.integers(1, 9), v=st.integers(1, 70), chunk=st.integers(1, 300), scale=st.sampled_from([0.1, 1.0, 30.0])
)
def test_core_ce_property(n: int, c: int, v: int, chunk: int, scale: float) -> None:
    hidden, weight, bias, labels = factors(n, c, v)
    loss = ops.linear_cross_entropy(hidden * scale, weight, labels, bias=bias, chunk=chunk).loss
    expected = brute_force(hidden * scale, weight, bias, labels)
    torch.testing.assert_close(loss.double(), expected, atol=1e-5 * scale + 1e-6, rtol=1e-5)
    upstream = torch.randn(n)
    for a, b in zip(
        torch.autograd.grad(loss, [hidden, weight, bias], upstream),
        torch.autograd.grad(expected, [hidden, weight, bias], upstream.double()),
    ):
        torch.testing.assert_close(a, b, atol=1e-4 * scale, rtol=1e-3)
