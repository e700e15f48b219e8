"""Targets of the contrastive losses against a dense target matrix T, and pairs that take no part.

Every case is compared in values and gradients, native in float32 and twin in float64, with a textbook loss that holds
all [R, C] logits and targets.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.ops.oracle import error, run
from vlm import ops

R, C, E = 61, 150, 20
Dense = Callable[[Tensor], tuple[Tensor, Tensor]]
BACKENDS = [("native", torch.float32, 2e-5), ("torch", torch.float64, 1e-11)]


def unit(n: int, width: int) -> Tensor:
    return F.normalize(torch.randn(n, width, dtype=torch.float64), dim=1)


def inputs(rows: int = R, columns: int = C) -> list[Tensor]:
    return [unit(rows, E), unit(columns, E), torch.tensor(2.3, dtype=torch.float64)]


def logits(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    return s.exp() * x @ y.T


def share(match: Tensor) -> Tensor:
    """Uniform over the matches of each row."""
    return match.double() / match.sum(1, keepdim=True).clamp(min=1)


def cross_entropy(z: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """mass * logsumexp over what counts - sum of T z; rows without anything that counts give 0."""
    out = []
    for row, t, c in zip(z, target, counted):
        out.append(t.sum() * torch.logsumexp(row[c], 0) - (t * row).sum() if c.any() else row.sum() * 0)
    return torch.stack(out)


def same(ours: Callable[..., tuple[Tensor, ...]], textbook: Callable[..., tuple[Tensor, ...]], given: list[Tensor]) -> None:
    exact = run(textbook, given, "torch", torch.float64)
    for backend, dtype, tolerance in BACKENDS:
        for got, expected in zip(run(ours, given, backend, dtype), exact):  # type: ignore[arg-type]
            assert error(got, expected) < tolerance


ids_x, ids_y = torch.arange(R) % 23, torch.arange(C) % 29  # some of either side have no partner
match = ids_x[:, None] == ids_y[None, :]
groups = {"groups_x": ids_x, "groups_y": ids_y}


@pytest.mark.parametrize("per_sample", [False, True])
def test_core_infonce_smoothing_equals_a_dense_target(per_sample: bool) -> None:
    eps_x, eps_y = (torch.rand(R).double() * 0.5, torch.rand(C).double() * 0.5) if per_sample else (0.2, 0.2)

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        smoothing = (eps_x.to(x), eps_y.to(x)) if isinstance(eps_x, Tensor) and isinstance(eps_y, Tensor) else 0.2
        return ops.contrastive_softmax(x, y, s, **groups, smoothing=smoothing)

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z, values = logits(x, y, s), []
        for scores, positive, eps in ((z, match, eps_x), (z.T, match.T, eps_y)):
            eps = eps[:, None] if isinstance(eps, Tensor) else eps
            target = (1 - eps) * share(positive) + eps * positive.any(1, keepdim=True).double() / scores.shape[1]
            values.append(cross_entropy(scores, target, torch.ones_like(positive)))
        return values[0], values[1]

    same(ours, textbook, inputs())


def test_core_infonce_noise_adaptive_targets_are_a_smoothing() -> None:
    """1 - w on the diagonal and w / (B - 1) elsewhere is eps = w B / (B - 1)."""
    omega = torch.rand(R).double() * 0.5
    target = torch.diag(1 - omega) + (omega / (R - 1))[:, None] * (1 - torch.eye(R).double())

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor]:
        eps = (omega * R / (R - 1)).to(x)
        return (ops.contrastive_softmax(x, y, s, smoothing=(eps, eps))[0],)

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor]:
        return (-(target * F.log_softmax(logits(x, y, s), 1)).sum(1),)

    same(ours, textbook, inputs(R, R))


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_core_infonce_teacher_targets_equal_a_dense_softmax(alpha: float) -> None:
    a, b = unit(R, 13), unit(C, 13)

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        teacher = ops.Teacher(a.to(x), b.to(x), scale=7.0, share=alpha)
        return ops.contrastive_softmax(x, y, s, **groups, teacher=teacher, smoothing=0.1)

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z, u, values = logits(x, y, s), 7.0 * a @ b.T, []
        for scores, taught, positive in ((z, u, match), (z.T, u.T, match.T)):
            target = (1 - alpha) * share(positive) + alpha * F.softmax(taught, 1)
            target = 0.9 * target + 0.1 * target.sum(1, keepdim=True) / scores.shape[1]
            values.append(cross_entropy(scores, target, torch.ones_like(positive)))
        return values[0], values[1]

    same(ours, textbook, inputs())


def test_core_infonce_a_teacher_of_the_same_embeddings_gives_no_gradient_to_the_logits() -> None:
    x, y, s = (t.float() for t in inputs(R, R))
    x.requires_grad_()
    with ops.backend("native"):
        rows, columns = ops.contrastive_softmax(x, y, s, teacher=ops.Teacher(x.detach(), y, scale=float(s.exp())))
    (gradient,) = torch.autograd.grad(rows.sum() + columns.sum(), x)
    assert gradient.abs().max() < 2e-5


def test_core_infonce_listed_targets_equal_a_dense_target() -> None:
    top_x, top_y = torch.randint(-1, C, (R, 4)), torch.randint(-1, R, (C, 3))
    weight_x, weight_y = torch.rand(R, 4).double(), torch.rand(C, 3).double()

    def dense(index: Tensor, weight: Tensor, n: int) -> Tensor:
        out = torch.zeros(len(index), n, dtype=torch.float64)
        for k in range(index.shape[1]):
            live = index[:, k] >= 0
            out[live.nonzero().flatten(), index[live, k]] += weight[live, k]
        return out

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ops.contrastive_softmax(x, y, s, listed_x=(top_x, weight_x.to(x)), listed_y=(top_y, weight_y.to(x)))

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z = logits(x, y, s)
        every = torch.ones(R, C, dtype=torch.bool)
        return cross_entropy(z, dense(top_x, weight_x, C), every), cross_entropy(z.T, dense(top_y, weight_y, R), every.T)

    same(ours, textbook, inputs())


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("kind", ["none", "ids", "similar"])
def test_core_infonce_excluded_pairs_take_no_part(kind: str, decoupled: bool) -> None:
    out_x, out_y = torch.randint(0, 9, (R,)), torch.randint(0, 9, (C,))
    a, b = unit(R, 5), unit(C, 5)
    excluded = {"none": torch.zeros_like(match), "ids": out_x[:, None] == out_y[None, :], "similar": a @ b.T > 0.3}[kind]
    kept = match | ~excluded

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        extra = {"none": {}, "ids": {"exclude_x": out_x, "exclude_y": out_y},
                 "similar": {"teacher": ops.Teacher(a.to(x), b.to(x), share=0.0, similar=0.3)}}[kind]
        return ops.contrastive_softmax(x, y, s, **groups, decoupled=decoupled, smoothing=0.1, **extra)  # type: ignore[arg-type]

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        z, values = logits(x, y, s), []
        for scores, positive, live in ((z, match, kept), (z.T, match.T, kept.T)):
            target = 0.9 * share(positive) + 0.1 * share(live) * positive.any(1, keepdim=True).double()
            values.append(cross_entropy(scores, target, live & ~positive if decoupled else live))
        return values[0], values[1]

    same(ours, textbook, inputs())


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_decoupled_loss_of_one_pair_has_no_denominator(backend: ops.Backend) -> None:
    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ops.contrastive_softmax(x, y, s, decoupled=True)

    for value in run(ours, inputs(1, 1), backend, torch.float32):
        assert (value == 0).all()


def test_queued_negatives_are_columns_without_a_gradient() -> None:
    queue_x, queue_y = unit(40, E), unit(300, E)

    def ours(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return ops.contrastive_softmax(x, y, s, queue_x=queue_x.to(x), queue_y=queue_y.to(x), smoothing=0.1)

    def textbook(x: Tensor, y: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        values = []
        for left, right, queue in ((x, y, queue_y), (y, x, queue_x)):
            z = s.exp() * left @ torch.cat([right, queue]).T
            target = 0.9 * torch.eye(len(left), z.shape[1], dtype=torch.float64) + 0.1 / z.shape[1]
            values.append(-(target * F.log_softmax(z, 1)).sum(1))
        return values[0], values[1]

    same(ours, textbook, inputs(R, R))


@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("taught", [0.0, 0.6])
def test_core_siglip_soft_labels_equal_the_dense_loss(weight: float, taught: float) -> None:
    high, low = torch.rand(R).double(), torch.rand(R).double() * 0.2
    a, b = unit(R, 5), unit(C, 5)
    out_x, out_y = torch.randint(0, 9, (R,)), torch.randint(0, 9, (C,))
    kept = match | (out_x[:, None] != out_y[None, :])

    def ours(x: Tensor, y: Tensor, s: Tensor, b_: Tensor) -> tuple[Tensor, Tensor]:
        teacher = ops.Teacher(a.to(x), b.to(x), scale=6.0, bias=-1.0, share=taught) if taught else None
        return ops.contrastive_sigmoid(x, y, s, b_, **groups, labels=(high.to(x), low.to(x)), negative_weight=weight,
                                       teacher=teacher, exclude_x=out_x, exclude_y=out_y)

    def textbook(x: Tensor, y: Tensor, s: Tensor, b_: Tensor) -> tuple[Tensor, Tensor]:
        label = torch.where(match, high[:, None], low[:, None])
        label = (1 - taught) * label + taught * torch.sigmoid(6.0 * a @ b.T - 1.0)
        terms = F.binary_cross_entropy_with_logits(logits(x, y, s) + b_, label, reduction="none")
        terms = terms * torch.where(match, torch.ones((), dtype=torch.float64), weight) * kept
        return terms.sum(1), terms.sum(0)

    same(ours, textbook, [*inputs(), torch.tensor(-2.0, dtype=torch.float64)])


def test_core_siglip_listed_labels_equal_the_dense_loss() -> None:
    index, add = torch.randint(-1, C, (R, 3)), torch.rand(R, 3).double() * 0.3
    label = match.double()
    for i in range(R):
        for k in range(3):
            if index[i, k] >= 0:
                label[i, index[i, k]] += add[i, k]

    def ours(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return ops.contrastive_sigmoid(x, y, s, b, **groups, listed=(index, add.to(x)))

    def textbook(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = logits(x, y, s) + b
        terms = F.softplus(z) - label * z
        return terms.sum(1), terms.sum(0)

    same(ours, textbook, [*inputs(), torch.tensor(-2.0, dtype=torch.float64)])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_siglip_labels_of_one_and_zero_are_the_hard_loss(backend: ops.Backend) -> None:
    x, y, s = (t.float() for t in inputs(R, R))
    labels = (torch.ones(R), torch.zeros(R))
    with ops.backend(backend):
        soft = ops.contrastive_sigmoid(x, y, s, torch.tensor(-3.0), labels=labels)
        hard = ops.contrastive_sigmoid(x, y, s, torch.tensor(-3.0))
    for a, b in zip(soft, hard):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6)


def test_core_siglip_bias_gradient_of_zero_embeddings() -> None:
    bias = torch.tensor(-1.5, requires_grad=True)
    with ops.backend("native"):
        ops.contrastive_sigmoid(torch.zeros(70, 8), torch.zeros(70, 8), torch.tensor(2.0), bias)[0].mean().backward()
    assert bias.grad is not None
    assert float(bias.grad) == pytest.approx(float((70 * 70 * torch.sigmoid(torch.tensor(-1.5)) - 70) / 70), rel=1e-5)


def test_core_siglip_half_a_label_gives_no_gradient_at_a_logit_of_zero() -> None:
    x = torch.zeros(5, 8, requires_grad=True)
    half = torch.full((5,), 0.5)
    with ops.backend("native"):
        ops.contrastive_sigmoid(x, torch.eye(5, 8), torch.tensor(1.0), torch.zeros(()), labels=(half, half))[0].sum().backward()
    assert x.grad is not None
    assert (x.grad == 0).all()


def test_bits_of_all_targets_do_not_depend_on_the_thread_count(level: str) -> None:
    given = [*inputs(250, 520), torch.tensor(-1.0, dtype=torch.float64)]
    out_x, out_y, a, b = torch.randint(0, 9, (250,)), torch.randint(0, 9, (520,)), unit(250, 12), unit(520, 12)

    def both(x: Tensor, y: Tensor, s: Tensor, shift: Tensor) -> tuple[Tensor, ...]:
        teacher = ops.Teacher(a.to(x), b.to(x), scale=5.0, share=0.5)
        kw = {"exclude_x": out_x, "exclude_y": out_y, "teacher": teacher}
        return (*ops.contrastive_softmax(x, y, s, smoothing=0.1, **kw), *ops.contrastive_sigmoid(x, y, s, shift, **kw))

    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(run(both, given, "native", torch.float32))
    for p, q in zip(*results):
        assert torch.equal(p, q)
    exact = run(both, given, "torch", torch.float64)
    assert max(error(p, q) for p, q in zip(results[0][:6], exact[:6])) < 2e-5


def test_bfloat16_is_read_without_a_float_copy_and_keeps_its_type(level: str) -> None:
    x, y, s = (t.float() for t in inputs(R, C))
    x, y = x.bfloat16().requires_grad_(), y.bfloat16().requires_grad_()
    with ops.backend("native"):
        rows, columns = ops.contrastive_softmax(x, y, s)
        dx, dy = torch.autograd.grad(rows.sum() + columns.sum(), (x, y))
        wide = [t.detach().float().requires_grad_() for t in (x, y)]
        rows_2, columns_2 = ops.contrastive_softmax(*wide, s)
        exact = torch.autograd.grad(rows_2.sum() + columns_2.sum(), wide)
    assert dx.dtype == dy.dtype == torch.bfloat16
    assert torch.equal(rows, rows_2)
    assert torch.equal(columns, columns_2)
    assert torch.equal(dx, exact[0].bfloat16())
    assert torch.equal(dy, exact[1].bfloat16())


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_gradcheck_of_the_twins(kind: str) -> None:
    x, y, s = (t.requires_grad_() for t in (unit(4, 3), unit(5, 3), torch.tensor(0.7, dtype=torch.float64)))
    out_x, out_y = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 3, 2, 1])
    teacher = ops.Teacher(unit(4, 2), unit(5, 2), scale=2.0, share=0.3)
    kw = {"exclude_x": out_x, "exclude_y": out_y, "teacher": teacher}
    with ops.backend("torch"):
        if kind == "softmax":
            listed = (torch.tensor([[0, 2], [1, -1], [3, 2], [4, 4]]), torch.rand(4, 2).double())
            torch.autograd.gradcheck(lambda *t: ops.contrastive_softmax(*t, smoothing=0.2, listed_x=listed, **kw), (x, y, s))
        else:
            b = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
            torch.autograd.gradcheck(lambda *t: ops.contrastive_sigmoid(*t, negative_weight=0.5, **kw), (x, y, s, b))


@pytest.mark.parametrize(("change", "message"), [
    ({"smoothing": 1.0}, "smoothing is 1.0"),
    ({"smoothing": (torch.zeros(3), torch.zeros(4))}, "smoothing of the rows"),
    ({"exclude_y": torch.zeros(4, dtype=torch.long)}, "exclude_y is given without exclude_x"),
    ({"teacher": ops.Teacher(torch.zeros(3, 2), torch.zeros(4, 2))}, "teacher must be"),
    ({"teacher": ops.Teacher(torch.zeros(4, 2), torch.zeros(4, 2), share=2.0)}, "share of 0 to 1"),
    ({"queue_y": torch.zeros(4, 9)}, "queue_y must be"),
    ({"listed_x": (torch.zeros(4, 2, dtype=torch.long), torch.zeros(4, 3))}, "listed_x must be"),
    ({"listed_x": (torch.full((4, 2), 4), torch.zeros(4, 2))}, "outside of -1..3"),
])
def test_wrong_targets_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.contrastive_softmax(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(()), **change)  # type: ignore[arg-type]
