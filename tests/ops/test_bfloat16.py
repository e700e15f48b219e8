"""bfloat16 storage: multiplied as it is at level avx512_bf16, converted to float32 at the levels below.

The yardstick is the plain formula in torch in bfloat16: its error against float64 on the same numbers, of which ours may be
twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.ops import masks
from vlm.ops.attention_native import _attention
from vlm.ops.backend import core

Call = Callable[..., tuple[Tensor, ...]]


@pytest.fixture(params=["avx2", "avx512", "avx512_bf16"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    native = core()
    if request.param not in native.supported_levels():
        pytest.skip(f"{request.param} does not run here")
    before = native.active_level()
    native.set_level(request.param)
    yield request.param
    native.set_level(before)


def halves(*shapes: tuple[int, ...], scale: float = 1.0) -> list[Tensor]:
    return [(torch.randn(shape, dtype=torch.float64) * scale).bfloat16() for shape in shapes]


def results(call: Call, inputs: list[Tensor], dtype: torch.dtype, backend: ops.Backend) -> list[Tensor]:
    """Outputs, and gradients of fixed random combinations of them, in float64."""
    leaves = [t.to(dtype).requires_grad_() for t in inputs]
    generator = torch.Generator().manual_seed(5)
    with ops.backend(backend):
        outputs = call(*leaves)
        weights = [torch.randn(o.shape, dtype=torch.float64, generator=generator).bfloat16() for o in outputs]
        finite = [torch.where(o.isfinite(), o, 0.0) for o in outputs]
        gradients = torch.autograd.grad(finite, leaves, [w.to(o.dtype) for w, o in zip(weights, outputs)])
    return [t.detach().double() for t in (*outputs, *gradients)]


def distance(got: Tensor, exact: Tensor) -> float:
    """Root of the mean square of the error over that of the exact numbers; infinities must agree."""
    infinite = exact.isinf()
    assert torch.equal(got[infinite], exact[infinite])
    if exact.numel() == int(infinite.sum()):
        return 0.0
    return float((got - exact)[~infinite].norm() / exact[~infinite].norm().clamp(min=1e-30))


def at_most_twice(ours: Call, theirs: Call, inputs: list[Tensor], exact: Call | None = None) -> None:
    right = results(exact or ours, inputs, torch.float64, "torch")
    mine = results(ours, inputs, torch.bfloat16, "native")
    peer = results(theirs, inputs, torch.bfloat16, "torch")
    for at, (a, b, c) in enumerate(zip(mine, peer, right)):
        assert distance(a, c) <= 2 * distance(b, c) + 1e-6, (at, distance(a, c), distance(b, c))


SHAPES = [
    (1, 1, 1, 1, 1, 1, 1), (1, 2, 2, 13, 31, 8, 16), (1, 2, 2, 14, 32, 16, 17), (1, 2, 2, 15, 33, 33, 8),
    (1, 2, 2, 55, 255, 16, 16), (2, 4, 2, 57, 257, 31, 15), (1, 2, 1, 113, 521, 24, 40),
]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_errs_at_most_twice_as_much_as_torch(shape: tuple[int, ...], causal: bool, level: str) -> None:
    b, h, g, n, m, d, v = shape

    def ours(q: Tensor, k: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return (ops.attention(q, k, value, causal=causal, alignment="top-left"),)

    def theirs(q: Tensor, k: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        k, value = (t.repeat_interleave(h // g, 1) for t in (k, value))
        scores = q @ k.transpose(2, 3) * d**-0.5
        allowed = torch.ones(n, m, dtype=torch.bool).tril() if causal else torch.ones(n, m, dtype=torch.bool)
        return (scores.masked_fill(~allowed, -torch.inf).softmax(3) @ value,)

    at_most_twice(ours, theirs, halves((b, h, n, d), (b, g, m, d), (b, g, m, v)))


@pytest.mark.parametrize("kind", ["padding", "window", "segments", "bias", "softcap", "dropout", "alibi"])
def test_attention_options_match_float64_on_the_same_numbers(kind: str, level: str) -> None:
    b, h, n = 2, 2, 301
    q, k, v = halves((b, h, n, 20), (b, h, n, 20), (b, h, n, 12))
    padding, ids = torch.rand(b, n) < 0.6, torch.randint(0, 5, (b, n)).sort(1).values
    padding[0] = False
    bias, slopes = torch.randn(1, h, n, n, dtype=torch.float64), torch.tensor([0.5, 0.1])

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, dict[str, object]] = {
            "padding": {"key_mask": padding, "causal": True}, "window": {"mask": masks.Window(40)},
            "segments": {"mask": masks.MaskProgram(masks.Causal(), masks.Segments(ids))}, "bias": {"bias": bias.to(q.dtype)},
            "softcap": {"softcap": 2.0}, "dropout": {"dropout": (0.3, 7)}, "alibi": {"bias": ops.Alibi(slopes)},
        }
        return ops.attention(q, k, v, return_lse=True, **options[kind])  # type: ignore[call-overload]

    exact = results(call, [q, k, v], torch.float64, "torch")
    for at, (got, right) in enumerate(zip(results(call, [q, k, v], torch.bfloat16, "native"), exact)):
        assert distance(got, right) < (2e-3 if at == 1 else 8e-3), (at, distance(got, right))


def test_attention_statistics_are_float32_and_masked_numbers_are_not_read(level: str) -> None:
    q, k, v = halves((2, 2, 50, 16), (2, 2, 70, 16), (2, 2, 70, 16))
    mask = torch.rand(2, 70) < 0.5
    clean = ops.attention(q, k, v, key_mask=mask, return_lse=True)
    for t in (k, v):
        t.transpose(1, 2)[~mask] = float("nan")
    dirty = ops.attention(q, k, v, key_mask=mask, return_lse=True)
    assert clean[1].dtype == torch.float32
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    logits = (q.double() @ k.double().nan_to_num().transpose(2, 3) / 4).masked_fill(~mask[:, None, None], -torch.inf)
    torch.testing.assert_close(clean[1].double(), logits.logsumexp(3), atol=1e-5, rtol=1e-5)


def test_attention_bits_do_not_depend_on_threads_or_strides(level: str) -> None:
    wide = halves((2, 67, 4, 25), (2, 530, 2, 25), (2, 530, 2, 25))
    q, k, v = (t.transpose(1, 2)[..., 1:] for t in wide)  # odd rows of an odd stride

    def run(threads: int, *inputs: Tensor) -> list[Tensor]:
        torch.set_num_threads(threads)
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = ops.attention(*leaves, causal=True)
        return [out, *torch.autograd.grad(out.float().square().sum(), leaves)]

    with ops.backend("native"):
        first = run(1, q, k, v)
        for other in (run(3, q, k, v), run(2, *(t.contiguous() for t in (q, k, v)))):
            for a, b in zip(first, other):
                assert torch.equal(a, b)


def test_attention_keeps_bfloat16_through_the_operator(level: str) -> None:
    q, k, v = (t.requires_grad_() for t in halves((1, 2, 20, 16), (1, 2, 30, 16), (1, 2, 30, 16)))
    torch.library.opcheck(_attention, (q, k, v, *[None] * 7, 0.25, False, 0, 0, 0, 0.0, 0.0, 0))
    with ops.backend("native"):
        compiled = torch.compile(lambda *t: ops.attention(*t), fullgraph=True, backend="aot_eager")(q, k, v)
        assert torch.equal(compiled, ops.attention(q, k, v))
        cosine = ops.attention(q, k, v, score="cosine", temperature=torch.tensor([4.0]))
    exact = ops.attention(q.double(), k.double(), v.double(), score="cosine", temperature=torch.tensor([4.0]).double())
    assert distance(cosine.detach().double(), exact.detach()) < 4e-3


@pytest.mark.parametrize("shape", [(1, 1, 1), (13, 47, 19), (130, 300, 37), (257, 255, 64)], ids=str)
def test_contrastive_softmax_errs_at_most_twice_as_much_as_torch(shape: tuple[int, int, int], level: str) -> None:
    rows, columns, width = shape
    inputs = [F.normalize(t.float(), dim=1).bfloat16() for t in halves((rows, width), (columns, width))]
    scale = torch.tensor(2.0)
    labels = torch.arange(min(rows, columns))

    def ours(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        first, second = ops.contrastive_softmax(x, y, scale.to(torch.promote_types(x.dtype, torch.float32)))
        return first[: len(labels)], second[: len(labels)]

    def theirs(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        logits = scale.exp().to(x.dtype) * (x @ y.T)
        return (F.cross_entropy(logits[: len(labels)], labels, reduction="none"),
                F.cross_entropy(logits.T[: len(labels)], labels, reduction="none"))

    at_most_twice(ours, theirs, inputs)


def test_contrastive_sigmoid_targets_and_threads(level: str) -> None:
    x, y = [F.normalize(t.float(), dim=1).bfloat16() for t in halves((140, 33), (290, 33))]
    s, bias = torch.tensor(2.3), torch.tensor(-4.0)
    exclude = (torch.randint(0, 9, (140,)), torch.randint(0, 9, (290,)))
    teacher = ops.Teacher(torch.randn(140, 8) / 3, torch.randn(290, 8) / 3, share=0.4)

    def call(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x.dtype, torch.float32)
        known = ops.Teacher(teacher.x.to(wide), teacher.y.to(wide), share=0.4)
        return (*ops.contrastive_sigmoid(x, y, s.to(wide), bias.to(wide), teacher=known,
                                          exclude_x=exclude[0], exclude_y=exclude[1]),
                *ops.contrastive_softmax(x, y, s.to(wide), teacher=known, smoothing=0.1,
                                          exclude_x=exclude[0], exclude_y=exclude[1]))

    exact = results(call, [x, y], torch.float64, "torch")
    torch.set_num_threads(1)
    single = results(call, [x, y], torch.bfloat16, "native")
    for at, (a, b) in enumerate(zip(single, exact)):
        assert distance(a, b) < (1e-5 if at < 4 else 8e-3), (at, distance(a, b))
    torch.set_num_threads(3)
    for a, b in zip(single, results(call, [x, y], torch.bfloat16, "native")):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rows", "width", "ids"), [(1, 1, 1), (13, 19, 31), (57, 33, 255), (100, 48, 257), (29, 20, 1031)])
def test_vocabulary_errs_at_most_twice_as_much_as_torch(rows: int, width: int, ids: int, level: str) -> None:
    hidden, weight = halves((rows, width), (ids, width), scale=0.7)
    labels = torch.randint(0, ids, (rows,))
    if rows > 5:
        labels[3] = -100

    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(h, w, labels).loss,)

    def theirs(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (F.cross_entropy(h @ w.T, labels, reduction="none"),)

    at_most_twice(ours, theirs, [hidden, weight])


def test_vocabulary_over_chunks_strides_and_threads(level: str) -> None:
    wide, table = halves((75, 37), (530, 40), scale=0.7)
    hidden, weight = wide[:, 3:], table[:, 2:36]
    labels = torch.randint(0, 530, (75,))

    def call(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (ops.linear_cross_entropy(h, w, labels, chunk=20 * 530).loss,)

    exact = results(call, [hidden, weight], torch.float64, "torch")
    torch.set_num_threads(1)
    single = results(call, [hidden, weight], torch.bfloat16, "native")
    for at, (a, b) in enumerate(zip(single, exact)):
        assert distance(a, b) < 8e-3, (at, distance(a, b))
    if level == "avx512_bf16":  # below it the products are torch's, which promises no bits
        torch.set_num_threads(3)
        for a, b in zip(single, results(call, [hidden, weight], torch.bfloat16, "native")):
            assert torch.equal(a, b)


@pytest.mark.parametrize("wants", [(True, False), (False, True)])
def test_vocabulary_gives_either_gradient_alone(wants: tuple[bool, bool], level: str) -> None:
    hidden, weight = halves((40, 24), (300, 24))
    labels = torch.randint(0, 300, (40,))
    both = [t.clone().requires_grad_() for t in (hidden, weight)]
    some = [t.clone().requires_grad_(want) for t, want in zip((hidden, weight), wants)]
    ops.linear_cross_entropy(both[0], both[1], labels, reduction="sum").loss.backward()
    ops.linear_cross_entropy(some[0], some[1], labels, reduction="sum").loss.backward()
    for a, b, want in zip(both, some, wants):
        assert (b.grad is not None) == want
        if want:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-2, rtol=1e-2)


def test_a_level_without_bfloat16_products_refuses_them() -> None:
    native = core()
    before = native.active_level()
    native.set_level("portable")
    try:
        assert not native.multiplies_bfloat16()
        with pytest.raises(ValueError, match="does not multiply bfloat16"):
            native.product_rows(rows=0, ids=0, width=0, hidden=(0, 0), weight=(0, 0), z=(0, 0), threads=1)
    finally:
        native.set_level(before)
    assert native.multiplies_bfloat16() == (native.active_level() == "avx512_bf16")
