"""Distillation over the vocabulary against float64 autograd on all logits of both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm import ops
from vlm.ops.vocabulary_reference import divergence_reference
from vlm.ops.vocabulary_teachers import chunked_distillation

KINDS: list[Any] = ["forward", "reverse", "symmetric", "js", "skew", "tv"]
MIXED = {"symmetric": 0.9, "js": 0.9, "skew": 0.1}


def factors(n: int, v: int, w: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """hidden [n, 6], weight [v, 6], bias [v] of a student; the same [n, 9], [w, 9], [w] of a teacher."""
    g = torch.Generator().manual_seed(n + v)
    shapes = [(n, 6), (v, 6), (v,), (n, 9), (w, 9), (w,)]
    return [torch.randn(s, generator=g, dtype=dtype).requires_grad_(i < 3) for i, s in enumerate(shapes)]


def brute_force(student: Tensor, teacher: Tensor, kind: str, temperature: float, mix: float) -> Tensor:
    """The textbook formulas on probabilities, float64."""
    size = min(student.shape[1], teacher.shape[1])
    p, q = ((x[:, :size].double() / temperature).softmax(1) for x in (student, teacher))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(1)

    return {
        "forward": lambda: kl(q, p),
        "reverse": lambda: kl(p, q),
        "symmetric": lambda: (1 - mix) * kl(q, p) + mix * kl(p, q),
        "js": lambda: (1 - mix) * kl(q, (1 - mix) * q + mix * p) + mix * kl(p, (1 - mix) * q + mix * p),
        "skew": lambda: kl(q, mix * q + (1 - mix) * p),
        "tv": lambda: 0.5 * (p - q).abs().sum(1),
    }[kind]()


@pytest.mark.parametrize("upstream", ["uniform", "of its own"])
@pytest.mark.parametrize(("n", "v", "w"), [(1, 2, 2), (7, 17, 17), (9, 40, 33), (5, 33, 40), (4, 1031, 1031)])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_of_two_models_is_that_of_all_logits(level: str, kind: Any, n: int, v: int, w: int, upstream: str) -> None:
    hidden, weight, bias, other, other_weight, other_bias = factors(n, v, w)
    student, teacher = (h.double() @ m.double().T + b.double() for h, m, b in ((hidden, weight, bias), (other, other_weight, other_bias)))
    leaves = [hidden, weight, bias]
    expected = brute_force(student, teacher, kind, 1.7, MIXED.get(kind, 0.5))
    got = ops.linear_distillation(
        hidden, weight, other, other_weight, bias=bias, teacher_bias=other_bias, divergence=kind, temperature=1.7, chunk=3 * v
    )
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    weights = torch.full((n,), -1.3) if upstream == "uniform" else torch.randn(n)
    for a, b in zip(torch.autograd.grad(got, leaves, weights), torch.autograd.grad(expected, leaves, weights.double())):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_give_a_teacher_and_all_backends_agree(kind: Any) -> None:
    for dtype in (torch.float32, torch.float64):
        hidden, weight, bias, other, other_weight, _ = factors(11, 30, 25, dtype)
        mask, weights = torch.arange(11) % 3 > 0, torch.rand(11, dtype=dtype)
        common: dict[str, Any] = {
            "bias": bias, "softcap": 5.0, "divergence": kind, "temperature": 0.8, "mask": mask, "token_weights": weights,
            "reduction": "mean",
        }  # fmt: skip
        logits = 3.0 * torch.tanh(other @ other_weight.T / 3.0)
        results = []
        for backend in ("auto", "torch"):
            with ops.backend(backend):  # type: ignore[arg-type]
                for value in (
                    ops.linear_distillation(hidden, weight, other, other_weight, teacher_softcap=3.0, chunk=99, **common),
                    ops.linear_distillation(hidden, weight, teacher_logits=logits, gradients="recompute", **common),
                ):
                    results.append([value, *torch.autograd.grad(value, [hidden, weight, bias])])
        for result in results[1:]:
            for a, b in zip(result, results[0]):
                torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_short_list_of_every_id_is_the_whole_teacher() -> None:
    hidden, weight, bias, other, other_weight, _ = factors(8, 30, 30)
    logits = other @ other_weight.T
    values, ids = logits.topk(30)
    upstream = torch.randn(8)
    results = []
    for teacher in ({"teacher_logits": logits}, {"teacher_top": (values, ids)}):
        for backend in ("auto", "torch"):
            with ops.backend(backend):  # type: ignore[arg-type]
                out = ops.linear_distillation(hidden, weight, bias=bias, temperature=2.0, chunk=70, **teacher)  # type: ignore[arg-type]
                results.append([out, *torch.autograd.grad(out, [hidden, weight, bias], upstream)])
    for result in results[1:]:
        for a, b in zip(result, results[0]):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_short_list_has_no_probability_elsewhere() -> None:
    hidden, weight, _, other, other_weight, _ = factors(8, 30, 30)
    values, ids = (other @ other_weight.T).topk(4)
    q = torch.zeros(8, 30, dtype=torch.float64).scatter(1, ids, values.double().softmax(1))
    log_p = (hidden.double() @ weight.double().T).log_softmax(1)
    expected = (torch.special.xlogy(q, q) - q * log_p).sum(1)
    got = ops.linear_distillation(hidden, weight, teacher_top=(values, ids))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    for a, b in zip(torch.autograd.grad(got.sum(), [hidden, weight]), torch.autograd.grad(expected.sum(), [hidden, weight])):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="short list leaves"):
        ops.linear_distillation(hidden, weight, teacher_top=(values, ids), divergence="reverse")


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_are_no_distance_apart_and_have_no_gradient(kind: Any) -> None:
    hidden, weight, bias, *_ = factors(6, 40, 40)
    value = ops.linear_distillation(hidden, weight, hidden, weight, bias=bias, teacher_bias=bias, divergence=kind)
    assert value.abs().max() < 1e-6
    for gradient in torch.autograd.grad(value.sum(), [hidden, weight]):
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_absent_ids_and_masked_rows_are_never_read(kind: Any) -> None:
    hidden, weight, _bias, other, other_weight, _ = factors(9, 20, 20)
    logits = other @ other_weight.T
    logits[:, [3, 7]] = -math.inf
    mask = torch.arange(9) % 4 > 0
    kept = [i for i in range(20) if i not in (3, 7)]
    expected = ops.linear_distillation(hidden[mask], weight[kept], teacher_logits=logits[mask][:, kept], divergence=kind)
    with torch.no_grad():
        hidden[~mask] = math.nan
        logits[~mask] = math.nan
    got = ops.linear_distillation(hidden, weight, teacher_logits=logits, mask=mask, divergence=kind)
    torch.testing.assert_close(got[mask], expected)
    assert not got[~mask].any()
    gradients = torch.autograd.grad(got.sum(), [hidden, weight])
    assert all(g.isfinite().all() for g in gradients)
    assert not gradients[0][~mask].any()
    assert not gradients[1][[3, 7]].any()


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_the_twin(kind: Any) -> None:
    student, teacher = (torch.randn(3, 6, dtype=torch.float64) for _ in range(2))
    teacher[0, 2] = -math.inf
    assert torch.autograd.gradcheck(
        lambda s: divergence_reference(s, teacher, divergence=kind, temperature=1.3), (student.requires_grad_(),)
    )


def test_half_teacher_and_no_rows() -> None:
    hidden, weight, _, other, other_weight, _ = factors(6, 30, 30)
    exact = ops.linear_distillation(hidden, weight, other, other_weight)
    half = ops.linear_distillation(hidden, weight, other.bfloat16(), other_weight.bfloat16())
    torch.testing.assert_close(half, exact, atol=5e-2, rtol=5e-2)
    none = ops.linear_distillation(hidden[:0], weight, other[:0], other_weight, reduction="mean")
    assert none.item() == 0
    assert not torch.autograd.grad(none, weight)[0].any()


def test_distillation_passes_opcheck_and_compiles() -> None:
    hidden, weight, bias, other, other_weight, _ = factors(6, 9, 8)
    options = ("js", 1.5, 0.3, 0.0, 0.0, 20, torch.float32, torch.float32, True, True, True, True)
    mask = torch.arange(6) > 1
    torch.library.opcheck(chunked_distillation, (hidden, weight, bias, [other, other_weight], mask, torch.rand(6), "factors", *options))

    def step(h: Tensor, w: Tensor) -> Tensor:
        return ops.linear_distillation(h, w, other, other_weight, divergence="reverse", reduction="mean")

    expected = torch.autograd.grad(step(hidden, weight), [hidden, weight])
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(hidden, weight), [hidden, weight])
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "one teacher"),
        ({"teacher_hidden": torch.zeros(2, 4)}, "one teacher"),
        ({"teacher_logits": torch.zeros(3, 5)}, "must have 2 rows"),
        ({"teacher_logits": torch.zeros(2, 5), "divergence": "kl"}, "unknown divergence"),
        ({"teacher_logits": torch.zeros(2, 5), "temperature": 0.0}, "must be positive"),
        ({"teacher_logits": torch.zeros(2, 5), "divergence": "js", "mix": 1.0}, "between 0 and 1"),
        ({"teacher_logits": torch.zeros(2, 5), "mask": torch.ones(2)}, "mask must be bool"),
        ({"teacher_top": (torch.zeros(2, 5), torch.zeros(2, 4).long())}, "a short list is"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear_distillation(torch.zeros(2, 3), torch.zeros(9, 3), **change)
