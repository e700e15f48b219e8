"""Drawn attention calls against float64 by the definition, pair by pair: nothing of `vlm.ops` is in the oracle.

Mask programs of up to three atoms, opened by global tokens or not, `causal` with both alignments, a key mask, every bias, dot and
cosine scores, scales and caps; shapes with sizes of 0 and 1 and across tiles, strides, float32, bfloat16 and float16. Results: values,
lse, all gradients, and the statistics of the matrix (column sums, chosen rows and columns, entropy, best key).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import run
from tests.ops.test_attention_masks import ATOMS, LOCAL, number
from tests.ops.test_programs_property import laid_out
from vlm import ops
from vlm.ops import masks
from vlm.ops.attention_bias import Alibi, AnyBias, BucketBias, GridBias, KeyBias
from vlm.ops.masks import MaskProgram

SHAPES = st.one_of(st.tuples(st.integers(1, 33), st.integers(1, 40)), st.tuples(st.integers(1, 4), st.integers(100, 280)),
                   st.tuples(st.integers(100, 140), st.integers(1, 6)), st.tuples(st.integers(0, 3), st.integers(0, 3)))
DTYPES = {torch.float32: 3e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@dataclass(frozen=True)
class Drawn:
    """One call: shapes, what its options are, and the seed of its numbers."""

    b: int
    g: int
    group: int
    shape: tuple[int, int]
    d: int
    v: int
    seed: int
    atoms: int
    opened: bool
    bias: str
    layout: str
    causal: bool
    alignment: str
    padded: bool
    softcap: float | None
    cosine: bool
    scale: float | None


calls = st.builds(
    Drawn, b=st.integers(1, 2), g=st.integers(1, 2), group=st.integers(1, 2), shape=SHAPES, d=st.sampled_from([1, 8, 19]),
    v=st.sampled_from([1, 8, 17]), seed=st.integers(0, 10**6), atoms=st.integers(0, 3), opened=st.booleans(),
    bias=st.sampled_from(["none", "dense", "removing", "alibi", "buckets", "one-sided buckets", "key", "grid"]),
    layout=st.sampled_from(["contiguous", "heads last", "cut", "shared batch"]), causal=st.booleans(),
    alignment=st.sampled_from(["bottom-right", "top-left"]), padded=st.booleans(), softcap=st.sampled_from([None, 2.0]),
    cosine=st.booleans(), scale=st.sampled_from([None, 0.7]))


@dataclass
class Problem:
    """A call with its numbers: options of the operator, and the same by definition."""

    n: int
    m: int
    tensors: list[Tensor]
    biases: list[Tensor]
    temperature: list[Tensor]
    options: dict[str, Any]
    allow: Tensor
    make: Any
    places: Any


def bucket(d: int, count: int, most: int, both: bool) -> int:
    first = 0
    if both:
        count //= 2
        first, d = (count if d < 0 else 0), abs(d)
    d = max(d, 0)
    near = count // 2
    return first + (d if d < near else min(count - 1, near + int(math.log(d / near) / math.log(most / near) * (count - near))))


def bias_of(c: Drawn, n: int, m: int, g: torch.Generator) -> tuple[list[Tensor], Any, Any]:
    """(numbers, none or one tensor; what makes the bias of the operator; what makes [B | 1, H | 1, N | 1, M | 1])."""
    h, lag = c.g * c.group, torch.arange(n)[:, None] + (m - n) - torch.arange(m)[None]
    if c.bias == "none":
        return [], None, None
    if c.bias in ("dense", "removing"):
        extents = [size if number(g, 0, 1) else 1 for size in (c.b, h, n, m)]
        numbers = torch.randn(extents, generator=g, dtype=torch.float64)
        if c.bias == "removing":
            numbers = numbers.masked_fill(torch.rand(extents, generator=g) < 0.3, -math.inf)
        return [numbers], lambda t: t, lambda t: t
    if c.bias == "alibi":
        return [torch.rand(h, generator=g, dtype=torch.float64)], \
            lambda t: Alibi(t, cap=9), lambda t: -t[:, None, None] * lag.abs().clamp(max=9)
    if c.bias.endswith("buckets"):
        both = c.bias == "buckets"
        at = torch.tensor([[bucket(int(d), 8, 21, both) for d in row] for row in lag], dtype=torch.int64).view(n, m)
        return [torch.randn(8, h, generator=g, dtype=torch.float64)], \
            lambda t: BucketBias(t, bidirectional=both, max_distance=21), lambda t: t[at].permute(2, 0, 1)
    if c.bias == "key":
        return [torch.randn(1, m, generator=g, dtype=torch.float64)], KeyBias, lambda t: t[:, None, None]
    rows = max(r for r in range(1, n + 1) if n % r == 0 and r * r <= n)
    columns = n // rows
    i = torch.arange(n)
    dy, dx = (a[:, None] - a[None] for a in (i // columns, i % columns))
    at = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    return [torch.randn((2 * rows - 1) * (2 * columns - 1), h, generator=g, dtype=torch.float64)], \
        lambda t: GridBias(t, rows, columns), lambda t: t[at].permute(2, 0, 1)


def problem_of(c: Drawn, dtype: torch.dtype) -> Problem:
    g = torch.Generator().manual_seed(c.seed)
    h, (n, m) = c.g * c.group, c.shape
    if c.bias == "grid":
        n = m = max(1, min(n, m))
    tensors = [torch.randn(s, generator=g, dtype=torch.float64) for s in ((c.b, h, n, c.d), (c.b, c.g, m, c.d), (c.b, c.g, m, c.v))]
    if c.cosine:  # away from 0, where a direction has no bounded gradient
        tensors[:2] = [t + t.sign() * 0.5 for t in tensors[:2]]
    tensors = [t.to(dtype).double() for t in tensors]
    biases, make, places = bias_of(c, n, m, g)
    biases = [t.float().double() for t in biases]
    temperature = [(torch.rand(h if number(g, 0, 1) else 1, generator=g) * 4 + 1).double()] if c.cosine else []
    drawn = [ATOMS[number(g, 0, len(ATOMS) - 1)] for _ in range(c.atoms if n and m else 0)]
    made = [maker(g, c.b, h, n, m) for maker in drawn]
    atoms: list[masks.Atom] = [atom for atom, _ in made]
    gq, gk = torch.rand(c.b, n, generator=g) < 0.1, torch.rand(c.b, m, generator=g) < 0.1
    if c.opened:
        atoms.insert(number(g, 0, len(atoms)), masks.GlobalTokens(gq, gk))
    allow = torch.ones(c.b, h, n, m, dtype=torch.bool)
    for maker, (_, pair) in zip(drawn, made):
        own = torch.tensor([[[[pair(b, k, i, j) for j in range(m)] for i in range(n)] for k in range(h)] for b in range(c.b)])
        allow &= own | (gq[:, None, :, None] | gk[:, None, None, :]) if c.opened and maker in LOCAL else own
    options: dict[str, Any] = {"mask": MaskProgram(*atoms) if atoms else None, "softcap": c.softcap, "scale": c.scale}
    if c.causal:
        options |= {"causal": True, "alignment": c.alignment}
        offset = m - n if c.alignment == "bottom-right" else 0
        allow &= torch.arange(n)[:, None] + offset >= torch.arange(m)
    if c.padded:
        options["key_mask"] = torch.rand(c.b, m, generator=g) < 0.8
        allow &= options["key_mask"][:, None, None]
    return Problem(n, m, tensors, biases, temperature, options, allow, make, places)


def matrix(c: Drawn, p: Problem, q: Tensor, k: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    """(P [B, H, N, M], lse [B, H, N]) in float64."""
    k = k.repeat_interleave(c.group, 1)
    if c.cosine:
        q, k = (t / t.square().sum(-1, keepdim=True).sqrt() for t in (q, k))
        s = (q @ k.mT) * more[-1][:, None, None]
    else:
        s = (q @ k.mT) * (c.d**-0.5 if c.scale is None else c.scale)
    s = s if c.softcap is None else c.softcap * torch.tanh(s / c.softcap)
    allow = p.allow
    if p.places is not None:
        added = p.places(more[0])
        allow = allow & ~added.isinf()
        s = s + torch.where(added.isinf(), 0.0, added)
    if not p.m:
        return torch.zeros_like(s), s.new_full(s.shape[:3], -math.inf)
    top = torch.where(allow, s, -1e300).amax(-1, keepdim=True).detach()
    e = torch.where(allow, (torch.where(allow, s, top) - top).exp(), 0.0)
    total = e.sum(-1, keepdim=True)
    lse = torch.where(total > 0, top + total.clamp(min=1e-300).log(), -math.inf)
    return e / total.clamp(min=1e-300), lse[..., 0]


def near(name: str, got: Tensor, want: Tensor, limit: float) -> None:
    """A number may be 0 but for rounding, so what counts is the error beside the size of an ordinary one."""
    assert got.shape == want.shape, f"{name}: {tuple(got.shape)}"
    assert torch.equal(got.isinf(), want.isinf()), f"{name}: other infinities"
    finite = want.isfinite()
    if finite.any():
        size = max(1.0, float(want[finite].abs().max()))
        worst = float((got.double() - want)[finite].abs().max())
        assert worst <= limit * size, f"{name}: {worst} of {size}"


def check_attention(c: Drawn, dtype: torch.dtype, backend: ops.Backend) -> None:
    p = problem_of(c, dtype)
    inputs = [*p.tensors, *p.biases, *p.temperature]
    options = p.options if not c.cosine else {name: value for name, value in p.options.items() if name != "scale"}

    def exact(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (laid_out(t, c.layout) for t in (q, k, v))
        weights, lse = matrix(c, p, q, k, *more)
        out = weights @ v.repeat_interleave(c.group, 1)
        if out.requires_grad:
            out.register_hook(lambda g: g.to(dtype).double())  # what comes back to a half type is of that type
        return out, lse

    def ours(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (laid_out(t if t.dtype == torch.float64 else t.to(dtype), c.layout) for t in (q, k, v))
        bias: AnyBias | None = None if p.make is None else p.make(more[0])
        return ops.attention(q, k, v, bias=bias, score="cosine" if c.cosine else "dot", temperature=more[-1] if c.cosine else None,
                             return_lse=True, **options)

    names = ["out", "lse", "dq", "dk", "dv", *["dbias"] * len(p.biases), *["dtemperature"] * len(p.temperature)]
    got = run(ours, inputs, backend, torch.float64 if backend == "torch" else torch.float32)
    empty = [torch.zeros(0), torch.zeros(0), *(torch.zeros_like(t) for t in inputs)]  # a gradient that nothing hangs on may be left out
    for name, one, want, zero in zip(names, got, run(exact, inputs, "torch", torch.float64), empty, strict=True):
        one, want = (t if t.numel() or name in ("out", "lse") else zero for t in (one, want))
        # In backward the rounded output is subtracted from the products of a whole row: a bias that sums over rows sees it most.
        wide = 4 if dtype != torch.float32 and name.startswith("d") else 1
        near(name, one, want, 1e-10 if backend == "torch" else wide * DTYPES[dtype])


@given(c=calls)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_core_exact_attention_drawn_calls_by_the_definition_in_float32(c: Drawn) -> None:
    check_attention(c, torch.float32, "native")


@given(c=calls)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_core_exact_attention_drawn_calls_by_the_definition_in_half_types(c: Drawn) -> None:
    check_attention(c, torch.bfloat16 if c.seed % 2 else torch.float16, "native")


@given(c=calls)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_core_exact_attention_drawn_calls_of_the_twin_by_the_definition(c: Drawn) -> None:
    check_attention(c, torch.float64, "torch")


@given(c=calls, temperature=st.sampled_from([1.0, 0.1]), half=st.sampled_from([torch.float32, *DTYPES]))
@settings(max_examples=120, deadline=None, derandomize=True)
def test_core_exact_attention_drawn_statistics_by_the_definition(c: Drawn, temperature: float, half: torch.dtype) -> None:
    """The temperature divides what is left after cap and bias, behind the mask."""
    c = Drawn(**{**vars(c), "cosine": False})
    p = problem_of(c, half)
    g = torch.Generator().manual_seed(c.seed + 1)
    q, k, _ = (laid_out(t, c.layout) for t in p.tensors)
    b, h, n, m = p.allow.shape
    s, _ = matrix(c, p, q, k, *p.biases)  # only its shape: the temperature needs the logits themselves
    logits = (q @ k.repeat_interleave(c.group, 1).mT) * (c.d**-0.5 if c.scale is None else c.scale)
    logits = logits if c.softcap is None else c.softcap * torch.tanh(logits / c.softcap)
    added = torch.zeros_like(s) if p.places is None else p.places(p.biases[0]).expand(b, h, n, m)
    allow = p.allow & ~added.isinf()
    logits = (logits + torch.where(added.isinf(), 0.0, added)) / temperature
    w = torch.where(allow, logits, -math.inf).softmax(-1).nan_to_num(0.0) if m else torch.zeros_like(s)
    lse = torch.where(allow, logits, -math.inf).logsumexp(-1) if m else s.new_full((b, h, n), -math.inf)
    weights = torch.randn(b, h, n, generator=g, dtype=torch.float64).float()
    rows = torch.randint(-1, max(n, 1), (b, 2), generator=g).clamp(max=n - 1)
    columns = torch.randint(0, max(m, 1), (b, 2), generator=g).clamp(max=m - 1)
    a, z = (laid_out(t.to(half), c.layout) for t in p.tensors[:2])
    bias = None if p.make is None else p.make(p.biases[0].float())
    for backend, limit in (("native", 3e-5), ("torch", 3e-5)):
        with ops.backend(backend):  # type: ignore[arg-type]
            found = ops.attention_row_statistics(a, z, bias=bias, temperature=temperature, **p.options)
            near("lse", found.lse, lse, limit)
            near("entropy", found.entropy, torch.special.entr(w).sum(-1), 4 * limit / temperature)
            assert torch.equal(found.best < 0, ~allow.any(-1))
            if m:
                chosen = w.gather(3, found.best.clamp(min=0)[..., None])[..., 0]
                assert (chosen >= w.amax(-1) * (1 - 1e-4)).all()
            for handed in (None, found.lse):
                got = ops.attention_column_sums(a, z, weights=weights, lse=handed, bias=bias, temperature=temperature, **p.options)
                near("column sums", got, (weights.double()[..., None] * w).sum(2), limit / temperature)
            if n:
                got = ops.attention_rows(a, z, rows, bias=bias, temperature=temperature, **p.options)
                want = torch.stack([torch.where(rows[i] >= 0, 1.0, 0.0)[None, :, None] * w[i][:, rows[i].clamp(min=0)] for i in range(b)])
                near("rows", got, want, limit / temperature)
            if m:
                got = ops.attention_columns(a, z, columns, bias=bias, temperature=temperature, **p.options)
                near("columns", got, torch.stack([w[i][:, :, columns[i]] for i in range(b)]), limit / temperature)
