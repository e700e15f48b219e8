"""Drawn attention calls: mask programs with biases, caps, cosine products, dropout, grouped heads, strides and dtypes.

The native core in float32 and bfloat16 against the twin in float64 on the same numbers, values and gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.oracle import error, run
from tests.ops.test_attention_masks import ATOMS, number
from vlm import ops
from vlm.ops import masks
from vlm.ops.attention_bias import Alibi, AnyBias, BucketBias, GridBias, KeyBias
from vlm.ops.masks import MaskProgram

BIASES = ["none", "dense", "alibi", "buckets", "key", "grid"]
LAYOUTS = ["contiguous", "heads last", "cut", "shared batch"]


@dataclass(frozen=True)
class Drawn:
    """One call: shapes, its mask and options, and the seed of its numbers."""

    b: int
    g: int
    group: int
    n: int
    m: int
    d: int
    v: int
    seed: int
    atoms: int
    opened: bool
    bias: str
    layout: str
    causal: bool
    softcap: float | None
    cosine: bool
    dropped: float


calls = st.builds(
    Drawn, b=st.integers(1, 2), g=st.integers(1, 2), group=st.integers(1, 3), n=st.integers(1, 70), m=st.integers(1, 300),
    d=st.sampled_from([1, 7, 16, 33]), v=st.sampled_from([1, 8, 19]), seed=st.integers(0, 10**6), atoms=st.integers(0, 3),
    opened=st.booleans(), bias=st.sampled_from(BIASES), layout=st.sampled_from(LAYOUTS), causal=st.booleans(),
    softcap=st.sampled_from([None, 2.0]), cosine=st.booleans(), dropped=st.sampled_from([0.0, 0.3]))


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The numbers of t [B, H, N, D] behind other strides, as a function of t that autograd follows."""
    if layout == "heads last":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "cut":
        return torch.nn.functional.pad(t, (1, 3, 2, 0))[:, :, 2:, 1:-3]
    return t[:1].expand_as(t) if layout == "shared batch" else t


def bias_of(c: Drawn, g: torch.Generator) -> tuple[list[Tensor], Callable[[Tensor], AnyBias] | None]:
    """Numbers of the bias, none or one tensor, and what makes the bias of them."""
    h = c.g * c.group
    if c.bias == "none":
        return [], None
    if c.bias == "dense":
        extents = [size if number(g, 0, 1) else 1 for size in (c.b, h, c.n)]
        return [torch.randn(*extents, c.m, generator=g, dtype=torch.float64)], lambda t: t
    if c.bias == "alibi":
        return [torch.rand(h, generator=g, dtype=torch.float64)], lambda t: Alibi(t, cap=9)
    if c.bias == "buckets":
        return [torch.randn(8, h, generator=g, dtype=torch.float64)], lambda t: BucketBias(t, max_distance=20)
    if c.bias == "key":
        return [torch.randn(1, c.m, generator=g, dtype=torch.float64)], KeyBias
    return [torch.randn(2 * c.n - 1, h, generator=g, dtype=torch.float64)], lambda t: GridBias(t, 1, c.n)


def check(c: Drawn, dtype: torch.dtype, limit: float) -> None:
    g = torch.Generator().manual_seed(c.seed)
    h, m = c.g * c.group, c.n if c.bias == "grid" else c.m
    shapes = ((c.b, h, c.n, c.d), (c.b, c.g, m, c.d), (c.b, c.g, m, c.v))
    inputs = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    if c.cosine:  # away from 0, where a direction has no bounded gradient
        inputs[:2] = [t + t.sign() * 0.5 for t in inputs[:2]]
    numbers, make = bias_of(c, g)
    inputs += numbers
    temperature = [torch.rand(h if number(g, 0, 1) else 1, generator=g, dtype=torch.float64) * 4 + 1] if c.cosine else []
    inputs = [t.to(dtype).double() for t in inputs[:3]] + [t.float().double() for t in inputs[3:] + temperature]
    atoms: list[masks.Atom] = [ATOMS[number(g, 0, len(ATOMS) - 1)](g, c.b, h, c.n, m)[0] for _ in range(c.atoms)]
    if c.opened:
        atoms.append(masks.GlobalTokens(torch.rand(c.b, c.n, generator=g) < 0.1, torch.rand(c.b, m, generator=g) < 0.1))
    program = MaskProgram(*atoms) if atoms else None

    def call(q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
        # Numbers of biases and temperatures are parameters: they stay in float32.
        q, k, v = (laid_out(t.to(dtype) if t.dtype == torch.float32 else t, c.layout) for t in (q, k, v))
        bias = None if make is None else make(more[0])
        dropout = (c.dropped, c.seed) if c.dropped else None
        return ops.attention(q, k, v, causal=c.causal, mask=program, bias=bias, softcap=c.softcap,
                             score="cosine" if c.cosine else "dot", temperature=more[-1] if c.cosine else None,
                             dropout=dropout, return_lse=True)

    exact = run(call, inputs, "torch", torch.float64)
    got = run(call, inputs, "native", torch.float32)
    for place, (ours, want) in enumerate(zip(got, exact)):
        # A gradient may be 0 but for rounding, so what counts is the error beside the size of an ordinary number.
        size = max(1.0, float(want[want.isfinite()].abs().max())) if want.isfinite().any() else 1.0
        assert ours.shape == want.shape
        assert torch.equal(ours.isinf(), want.isinf()), f"result {place}: other infinities"
        finite = want.isfinite()
        worst = float((ours.double() - want)[finite].abs().max()) if finite.any() else 0.0
        assert worst <= limit * size, f"result {place}: {worst} of {size}"


@given(c=calls)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_drawn_calls_in_float32(c: Drawn) -> None:
    check(c, torch.float32, 3e-5)


@given(c=calls)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_drawn_calls_in_bfloat16(c: Drawn) -> None:
    check(c, torch.bfloat16, 2.0**-6)


@pytest.mark.parametrize("heads", [1, 6])
def test_a_temperature_lies_anywhere(heads: int) -> None:
    """Temperatures cut out of a larger tensor have the gradient of their own head."""
    spread = torch.rand(3 * heads, dtype=torch.float64) + 1
    inputs = [torch.randn(2, 6, 9, 8, dtype=torch.float64) for _ in range(3)]

    def call(q: Tensor, k: Tensor, v: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (ops.attention(q, k, v, score="cosine", temperature=t[::3]),)

    exact = run(call, [*inputs, spread], "torch", torch.float64)
    got = run(call, [*inputs, spread], "native", torch.float32)
    assert max(error(a, b) for a, b in zip(got, exact)) < 1e-5
