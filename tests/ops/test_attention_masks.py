"""Mask programs: every atom against a predicate written here pair by pair, alone and in pairs, values and gradients."""

from __future__ import annotations

import itertools
import math
import pathlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error, run
from vlm import ops
from vlm.ops import masks
from vlm.ops.masks import MaskProgram, MaskShape

Pair = Callable[[int, int, int, int], bool]
"""(b, h, i, j) -> allowed."""
Made = tuple[masks.Atom, Pair]
Draw = torch.Generator


def number(g: Draw, low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (), generator=g))


def runs(g: Draw, rows: int, length: int, names: int, scattered: bool) -> Tensor:
    ids = torch.randint(0, names, (rows, length), generator=g)
    return ids if scattered else ids.sort(1).values


def causal(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    if number(g, 0, 1):
        return masks.Causal("top-left"), lambda _b, _h, i, j: i >= j
    return masks.Causal(), lambda _b, _h, i, j: i + m - n >= j


def window(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    size, one_sided = number(g, 1, m + 2), bool(number(g, 0, 1))
    return masks.Window(size, one_sided), lambda _b, _h, i, j: (0 if one_sided else 1 - size) <= i + m - n - j < size


def symmetric_window(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    size = number(g, 1, m + 2)
    return masks.SymmetricWindow(size), lambda _b, _h, i, j: abs(i + m - n - j) <= size // 2


def block_causal(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    size = number(g, 1, m)
    return masks.BlockCausal(size), lambda _b, _h, i, j: (i + m - n) // size >= j // size


def prefix(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    lengths = torch.randint(0, m + 1, (b if number(g, 0, 1) else 1,), generator=g)
    return masks.Prefix(lengths), lambda b_, _h, i, j: j < int(lengths[b_ % len(lengths)]) or i + m - n >= j


def lambda_shape(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    size, sinks = number(g, 1, m), number(g, 0, m // 2)
    return masks.Lambda(size, sinks), lambda _b, _h, i, j: i + m - n >= j and (i + m - n - j < size or j < sinks)


def spans(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    rows = b if number(g, 0, 1) else 1
    scattered = bool(number(g, 0, 1))
    keys = runs(g, rows, m, 4, scattered) - 1
    queries = runs(g, rows, n, 4, scattered) - 1
    return masks.Spans(queries, keys), lambda b_, _h, i, j: (
        i + m - n >= j or (int(queries[b_ % rows, i]) >= 0 and bool(queries[b_ % rows, i] == keys[b_ % rows, j])))


def segments(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    rows, scattered = b if number(g, 0, 1) else 1, bool(number(g, 0, 1))
    queries, keys = runs(g, rows, n, 5, scattered), runs(g, rows, m, 5, scattered)
    return masks.Segments(queries, keys), lambda b_, _h, i, j: bool(queries[b_ % rows, i] == keys[b_ % rows, j])


def facets(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    scattered, shared = bool(number(g, 0, 1)), number(g, 0, 2)
    queries, keys = runs(g, b, n, 4, scattered), runs(g, b, m, 4, scattered)
    return masks.Segments(queries, keys, shared=shared), lambda b_, _h, i, j: (
        bool(queries[b_, i] == keys[b_, j]) or int(keys[b_, j]) == shared)


def tile_tags(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    queries, keys = runs(g, b, n, 4, True), runs(g, b, m, 3, bool(number(g, 0, 1))) + 1
    return masks.TileTags(queries, keys), lambda b_, _h, i, j: (
        int(queries[b_, i]) == 0 or bool(queries[b_, i] == keys[b_, j]))


def padding(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    if number(g, 0, 1):
        lengths = torch.randint(0, m + 1, (b,), generator=g)
        return masks.KeyPadding(lengths), lambda b_, _h, i, j: j < int(lengths[b_])
    exists = torch.rand(b, m, generator=g) < 0.7
    return masks.KeyPadding(exists), lambda b_, _h, i, j: bool(exists[b_, j])


def dense(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    extents = [size if number(g, 0, 1) else 1 for size in (b, h, n, m)]
    allow = torch.rand(extents, generator=g) < 0.7
    full = allow.expand(b, h, n, m)
    return masks.Dense(allow), lambda b_, h_, i, j: bool(full[b_, h_, i, j])


def block_list(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    bq, bk, slots = number(g, 1, n + 3), number(g, 1, m + 3), number(g, 1, 4)
    blocks = -(-n // bq)
    rows, heads = b if number(g, 0, 1) else 1, h if number(g, 0, 1) else 1
    indices = torch.randint(0, -(-m // bk), (rows, heads, blocks, slots), generator=g)
    counts = torch.randint(0, slots + 1, (rows, heads, blocks), generator=g)
    return masks.BlockList(indices, counts, bq, bk), lambda b_, h_, i, j: (
        j // bk in indices[b_ % rows, h_ % heads, i // bq, : int(counts[b_ % rows, h_ % heads, i // bq])].tolist())


def rows_of_keys(g: Draw, b: int, h: int, n: int, m: int) -> Made:
    ranges = torch.randint(0, m + 1, (b, n, 2), generator=g).sort(2).values
    return masks.Rows(ranges), lambda b_, _h, i, j: int(ranges[b_, i, 0]) <= j < int(ranges[b_, i, 1])


ATOMS = [causal, window, symmetric_window, block_causal, prefix, lambda_shape, spans, segments, facets, tile_tags, padding,
         dense, block_list, rows_of_keys]
LOCAL = [window, symmetric_window, lambda_shape, block_list]


def pairs_allowed(pairs: list[Pair], b: int, h: int, n: int, m: int) -> Tensor:
    return torch.tensor([[[[all(p(b_, h_, i, j) for p in pairs) for j in range(m)] for i in range(n)] for h_ in range(h)]
                         for b_ in range(b)], dtype=torch.bool).view(b, h, n, m)


def check(program: MaskProgram, truth: Tensor, b: int, h: int, n: int, m: int, g: Draw) -> None:
    """The booleans of the twin are the truth; the kernel under the program is plain torch under the truth."""
    allow = program.allow(MaskShape(b, h, n, m, torch.device("cpu")))
    assert allow is None or torch.equal(allow.expand(b, h, n, m), truth)
    inputs = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((b, h, n, 8), (b, 1, m, 8), (b, 1, m, 6))]
    bias = torch.zeros(b, h, n, m, dtype=torch.float64).masked_fill(~truth, -math.inf)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, bias=bias, return_lse=True)

    def masked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, mask=program, return_lse=True)

    expected = run(exact, inputs, "torch", torch.float64)
    for backend, dtype in (("native", torch.float32), ("torch", torch.float64)):
        for got, want in zip(run(masked, inputs, backend, dtype), expected):  # type: ignore[arg-type]
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-6)  # a gradient may be 0 but for rounding


@pytest.mark.parametrize("make", ATOMS, ids=lambda f: f.__name__)
def test_core_exact_attention_every_atom_alone_at_every_level(make: Callable[..., Made], level: str) -> None:
    g = torch.Generator().manual_seed(5)
    for b, h, n, m in [(2, 2, 1, 1), (2, 1, 31, 37), (1, 2, 70, 70), (2, 1, 61, 300), (1, 1, 40, 13)]:
        atom, pair = make(g, b, h, n, m)
        check(MaskProgram(atom), pairs_allowed([pair], b, h, n, m), b, h, n, m, g)


@pytest.mark.parametrize("makes", list(itertools.combinations_with_replacement(ATOMS, 2)), ids=lambda p: "+".join(f.__name__ for f in p))
def test_core_exact_attention_every_pair_of_atoms(makes: tuple[Callable[..., Made], ...]) -> None:
    g = torch.Generator().manual_seed(6)
    b, h, n, m = 2, 2, 33, 41
    made = [make(g, b, h, n, m) for make in makes]
    check(MaskProgram(*(a for a, _ in made)), pairs_allowed([p for _, p in made], b, h, n, m), b, h, n, m, g)


@pytest.mark.parametrize("make", LOCAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_global_tokens_open_local_atoms_alone(make: Callable[..., Made], share: float, level: str) -> None:
    g = torch.Generator().manual_seed(7)
    for b, h, n, m in [(2, 1, 31, 37), (1, 2, 45, 290)]:
        local, near = make(g, b, h, n, m)
        hard, ever = segments(g, b, h, n, m)
        queries, keys = torch.rand(b, n, generator=g) < share, torch.rand(1, m, generator=g) < share / 10
        truth = pairs_allowed([lambda b_, h_, i, j, near=near, q=queries, k=keys:
                               near(b_, h_, i, j) or bool(q[b_, i]) or bool(k[0, j]), ever], b, h, n, m)
        check(MaskProgram(local, masks.GlobalTokens(queries, keys.expand(b, m)), hard), truth, b, h, n, m, g)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4), n=st.integers(1, 90), m=st.integers(1, 90), opened=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_random_programs(seed: int, count: int, n: int, m: int, opened: bool) -> None:
    g = torch.Generator().manual_seed(seed)
    made = [ATOMS[number(g, 0, len(ATOMS) - 1)](g, 2, 2, n, m) for _ in range(count)]
    atoms = [a for a, _ in made]
    if opened:
        atoms.append(masks.GlobalTokens(torch.rand(2, n, generator=g) < 0.1, torch.rand(2, m, generator=g) < 0.1))
    program = MaskProgram(*atoms)
    allow = program.allow(MaskShape(2, 2, n, m, torch.device("cpu")))
    assert allow is not None
    check(program, allow.expand(2, 2, n, m), 2, 2, n, m, g)


def test_core_exact_attention_long_window_equals_its_gather() -> None:
    """Many tiles: each query against its own keys, cut out."""
    q, k, v = (torch.randn(1, 2, 1500, 16) for _ in range(3))
    with ops.backend("native"):
        got = ops.attention(q, k, v, mask=masks.Window(100))
    for i in (0, 50, 99, 100, 700, 1023, 1024, 1499):
        near = slice(max(0, i - 99), i + 1)
        want = ops.attention(q[:, :, i : i + 1].double(), k[:, :, near].double(), v[:, :, near].double())
        assert error(got[:, :, i : i + 1], want) < 1e-5


def test_core_exact_attention_masks_meet_at_their_limits() -> None:
    q, k, v = (torch.randn(2, 2, 90, 16) for _ in range(3))
    with ops.backend("native"):
        full, plain = ops.attention(q, k, v), ops.attention(q, k, v, causal=True)
        assert torch.equal(ops.attention(q, k, v, mask=masks.Window(90)), plain)  # window >= N
        assert torch.equal(ops.attention(q, k, v, mask=masks.Prefix(torch.tensor([0]))), plain)
        assert torch.equal(ops.attention(q, k, v, mask=masks.Prefix(torch.tensor([90]))), full)
        assert torch.equal(ops.attention(q, k, v, mask=masks.Causal()), plain)
        assert torch.equal(ops.attention(q, k, v, mask=masks.BlockCausal(1)), plain)
        assert torch.equal(ops.attention(q, k, v, mask=masks.BlockCausal(90)), full)


def test_lm_infinite_short_text_is_causal_bit_for_bit() -> None:
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    with ops.backend("native"):
        assert torch.equal(ops.attention(q, k, v, mask=masks.Lambda(64, 4)), ops.attention(q, k, v, causal=True))
        assert torch.equal(ops.attention(q, k, v, mask=masks.Lambda(20, 0)), ops.attention(q, k, v, mask=masks.Window(20)))


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_core_facet_equals_each_facet_alone(backend: ops.Backend) -> None:
    """Prefix of 40 and three facets: the rows of a facet are those of `prefix + facet`; nothing flows between facets."""
    ids = torch.tensor([[0] * 40 + [1] * 11 + [2] * 7 + [3] * 20])
    q, k, v = (torch.randn(1, 2, 78, 16, requires_grad=True) for _ in range(3))
    mask = MaskProgram(masks.Causal(), masks.Segments(ids, shared=0))
    with ops.backend(backend):
        out = ops.attention(q, k, v, mask=mask)
        for facet in (1, 2, 3):
            at = (ids[0] == 0) | (ids[0] == facet)
            alone = ops.attention(q[:, :, at], k[:, :, at], v[:, :, at], causal=True)
            torch.testing.assert_close(out[:, :, ids[0] == facet], alone[:, :, 40:], rtol=1e-5, atol=1e-5)
        one = ops.attention(q, k, v, mask=MaskProgram(masks.Causal(), masks.Segments((ids > 0).long(), shared=0)))
        torch.testing.assert_close(one, ops.attention(q, k, v, causal=True))
    gradient = torch.autograd.grad(out[:, :, ids[0] == 1].sum(), v)[0]
    assert (gradient[:, :, ids[0] > 1] == 0).all()


def test_core_exact_attention_segments_equal_a_loop_over_documents() -> None:
    ids = torch.repeat_interleave(torch.arange(5), torch.tensor([300, 1, 77, 500, 13]))[None]
    inputs = [torch.randn(1, 2, ids.shape[1], 16, dtype=torch.float64) for _ in range(3)]

    def packed(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v, causal=True, mask=masks.Segments(ids)),)

    def loop(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        parts = [ops.attention(*(t[:, :, ids[0] == s] for t in (q, k, v)), causal=True) for s in range(5)]
        return (torch.cat(parts, 2),)

    for got, want in zip(run(packed, inputs, "native", torch.float32), run(loop, inputs, "torch", torch.float64)):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_garbage_in_padded_keys_of_a_program_does_not_leak(backend: ops.Backend) -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    mask = MaskProgram(masks.KeyPadding(torch.tensor([25])), masks.SymmetricWindow(9), masks.GlobalTokens(torch.arange(40)[None] < 2))
    dirty = [q, k.clone(), v.clone()]
    dirty[1][:, :, 25:], dirty[2][:, :, 25:] = math.nan, math.inf

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor]:
        return (ops.attention(q, k, v, mask=mask),)

    for a, b in zip(run(call, [q, k, v], backend, torch.float32), run(call, dirty, backend, torch.float32)):
        assert torch.equal(a, b)


def test_bits_do_not_depend_on_the_thread_count(level: str) -> None:
    inputs = [torch.randn(2, 2, 600, 16) for _ in range(3)]
    mask = MaskProgram(masks.Window(70, causal=False), masks.GlobalTokens(torch.rand(2, 600) < 0.01),
                       masks.Segments(torch.randint(0, 3, (2, 600)), shared=0))

    def call(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.attention(q, k, v, mask=mask, return_lse=True)

    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(call, inputs, "native", torch.float32))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


class Masked(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, ids: Tensor) -> Tensor:
        mask = MaskProgram(masks.Prefix(lengths), masks.Segments(ids, shared=0), masks.KeyPadding(lengths + 3),
                           masks.Lambda(4, 1), masks.BlockCausal(3))
        return ops.attention(q, k, v, mask=mask)


def example(b: int, n: int) -> tuple[Tensor, ...]:
    return (*(torch.randn(b, 2, n, 8) for _ in range(3)), torch.randint(1, n - 3, (b,)), torch.randint(0, 3, (b, n)).sort(1).values)


def test_programs_export_with_dynamic_lengths() -> None:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=5)
    tensor = {0: batch, 2: length}
    program = torch.export.export(Masked(), example(2, 9), dynamic_shapes=(tensor, tensor, tensor, {0: batch}, {0: batch, 1: length}))
    assert "vlm" not in {str(node.target).split(".")[0] for node in program.graph.nodes}
    inputs = example(3, 14)
    with ops.backend("native"):
        torch.testing.assert_close(program.module()(*inputs), Masked()(*inputs))


@pytest.mark.filterwarnings("ignore")
def test_programs_run_in_onnxruntime(tmp_path: pathlib.Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length", min=5)
    tensor = {0: batch, 2: length}
    torch.onnx.export(Masked().eval(), example(2, 9), str(tmp_path / "masked.onnx"), dynamo=True, verbose=False,
                      input_names=["q", "k", "v", "lengths", "ids"],
                      dynamic_shapes=(tensor, tensor, tensor, {0: batch}, {0: batch, 1: length}))
    session = runtime.InferenceSession(str(tmp_path / "masked.onnx"), providers=["CPUExecutionProvider"])
    inputs = example(3, 14)
    (got,) = session.run(None, {name: t.numpy() for name, t in zip(["q", "k", "v", "lengths", "ids"], inputs)})
    with ops.backend("native"):
        torch.testing.assert_close(torch.from_numpy(got), Masked()(*inputs), rtol=1e-4, atol=1e-5)


def test_programs_compile_as_one_graph() -> None:
    inputs = example(2, 30)
    inputs[0].requires_grad_()
    with ops.backend("native"):
        expected = Masked()(*inputs)
        got = torch.compile(Masked(), fullgraph=True, backend="aot_eager")(*inputs)
        (gradient,) = torch.autograd.grad(got.square().sum(), inputs[0])
        (want,) = torch.autograd.grad(expected.square().sum(), inputs[0])
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize(("atom", "message"), [
    (lambda: masks.Window(0), "Window: size is 0"),
    (lambda: masks.Causal("left"), "alignment is 'left'"),  # type: ignore[arg-type]
    (lambda: masks.Segments(torch.zeros(1, 7, dtype=torch.long)), "do not fit 5 queries"),
    (lambda: masks.Segments(torch.zeros(1, 5)), "Segments wants integers"),
    (lambda: masks.Prefix(torch.tensor([1, 2, 3])), "does not fit a batch of 2"),
    (lambda: masks.Dense(torch.ones(1, 1, 4, 5, dtype=torch.bool)), "cannot be broadcast"),
    (lambda: masks.KeyPadding(torch.ones(2, 4, dtype=torch.bool)), "KeyPadding must be bool"),
    (lambda: masks.BlockList(torch.full((1, 1, 5, 1), 9), torch.ones(1, 1, 5, dtype=torch.long), 1, 1), "does not exist"),
    (lambda: masks.BlockList(torch.zeros(1, 1, 1, 1, dtype=torch.long), torch.ones(1, 1, 1, dtype=torch.long), 1, 1), "do not fit"),
])
def test_what_does_not_fit_is_named(atom: Callable[[], masks.Atom], message: str) -> None:
    q = torch.zeros(2, 1, 5, 4)
    with ops.backend("native"), pytest.raises(ValueError, match=message):
        ops.attention(q, q, q, mask=atom())
