"""Chunked distillation over the vocabulary as a torch operator: two chunks of logits at a time, the gradient in the student's place.

N rows, C width, V ids of the student, W of the teacher, K ids of a teacher's short list. What is said of schedules and chunks in
`vocabulary_chunks` holds here too: four products in all, five more where the upstream gradient differs from row to row.
"""

from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.vocabulary_chunks import Gradients, Products, chunk_rows, gradient_shapes, spread, uniform
from vlm.ops.vocabulary_rows import Shape, cross_entropy_rows, divergence_rows


class _Teacher:
    """Chunks of the teacher's logits, or of its short list. parts: hidden, weight[, bias], or logits[, ids]."""

    def __init__(self, parts: list[Tensor], kind: str, softcap: float, product: torch.dtype, size: int, chosen: Tensor | None,
                 native: bool) -> None:
        self.kind, self.softcap = kind, softcap
        rows = parts[0] if chosen is None else parts[0][chosen]
        if kind == "factors":
            self.bias = parts[2][:size] if len(parts) > 2 else None
            self.products = Products(rows, parts[1][:size], product, False, False, native=native)
        else:
            self.rows, self.size = rows, size
            self.ids = None if kind == "logits" else (parts[1] if chosen is None else parts[1][chosen]).long()

    def into(self, chunk: Tensor, begin: int) -> None:
        """chunk [r, size] <- logits"""
        if self.kind == "logits":
            chunk.copy_(self.rows[begin : begin + len(chunk), : self.size])
            return
        if chunk.dtype == self.products.wide:
            self.products.into(chunk, begin)
        else:
            part = torch.empty_like(chunk, dtype=self.products.wide)
            self.products.into(part, begin)
            chunk.copy_(part)
        finish(chunk, self.bias, self.softcap)


def finish(products: Tensor, bias: Tensor | None, softcap: float, *, slope: bool = False) -> Tensor | None:
    """products [r, V] become logits in place; the derivative of the cap [r, V] if it is asked for and there is one."""
    if bias is not None:
        products.add_(bias)
    if not softcap:
        return None
    products.div_(softcap).tanh_()
    out = 1 - products.square() if slope else None
    products.mul_(softcap)
    return out


@dataclass(frozen=True)
class _How:
    divergence: str
    temperature: float
    mix: float
    native: bool


def _short_list(
    chunk: Tensor, teacher: _Teacher, begin: int, factors: Tensor | None, how: _How, *, gradient: bool
) -> Tensor:
    """KL(Q || S) of a Q that has only the K listed ids; the chunk of the student's logits becomes the gradient."""
    assert teacher.ids is not None
    part = slice(begin, begin + len(chunk))
    ids = teacher.ids[part]
    t = (teacher.rows[part].to(chunk.dtype) / how.temperature).log_softmax(1)
    q = t.exp()
    if how.temperature != 1:
        chunk.div_(how.temperature)
    s = chunk.gather(1, ids)
    none = torch.full((len(chunk),), -1, device=chunk.device)
    push = None if factors is None else factors / how.temperature
    push = torch.full_like(s[:, 0], 1 / how.temperature) if push is None else push
    lse, _, _ = cross_entropy_rows(chunk, None, none, push.contiguous(), Shape(), gradient=gradient, native=how.native)
    if gradient:
        chunk.scatter_add_(1, ids, -q * push[:, None])
    return (q * (t - s)).sum(1) + lse * q.sum(1)


def _sweep(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, parts: list[Tensor], kind: str, mask: Tensor | None,
    factors: Tensor | None, how: _How, softcap: float, teacher_softcap: float, chunk: int, product: torch.dtype,
    teacher_product: torch.dtype, want: tuple[bool, bool, bool],
) -> tuple[Tensor, Gradients]:  # fmt: skip
    """Values [N] and, where wanted, gradients of `(factors * value).sum()`. Rows outside of the mask are not read."""
    rows, ids, shape, dtype = len(hidden), len(weight), weight.shape, hidden.dtype
    chosen = None if mask is None or bool(mask.all()) else mask.nonzero()[:, 0]
    if chosen is not None:
        hidden, factors = hidden[chosen], None if factors is None else factors[chosen]
    size = ids if kind == "top" else min(ids, len(parts[1]) if kind == "factors" else parts[0].shape[1])
    gradient, nothing = any(want), hidden.new_empty(0)
    with torch.autocast(hidden.device.type, enabled=False):
        products = Products(hidden, weight[:size], product, *want[:2], native=how.native)
        teacher = _Teacher(parts, kind, teacher_softcap, teacher_product, size, chosen, how.native)
        wide = products.wide
        own_bias = None if bias is None else bias[:size].to(wide)
        d_bias = None if bias is None or not want[2] else torch.zeros_like(bias, dtype=wide)
        factors = None if factors is None else factors.to(wide).contiguous()
        step = chunk_rows(len(hidden), size, chunk)
        buffer = hidden.new_empty((step, size), dtype=wide)
        taught = hidden.new_empty((0 if kind == "top" else step, size), dtype=wide)
        values = hidden.new_empty(len(hidden), dtype=wide)
        for begin in range(0, len(hidden), step):
            part = slice(begin, min(begin + step, len(hidden)))
            s = buffer[: part.stop - begin]
            products.into(s, begin)
            slope = finish(s, own_bias, softcap, slope=gradient)
            own = None if factors is None else factors[part]
            if kind == "top":
                values[part] = _short_list(s, teacher, begin, own, how, gradient=gradient)
            else:
                t = taught[: part.stop - begin]
                teacher.into(t, begin)
                values[part] = divergence_rows(
                    s, t, own, how.divergence, how.temperature, how.mix, gradient=gradient, native=how.native
                )
            if slope is not None:
                s.mul_(slope)
            if gradient:
                products.add(s, begin)
            if d_bias is not None:
                d_bias[:size] += s.sum(0)
    d_weight = products.d_weight
    if d_weight is not None and size < ids:
        d_weight = torch.cat([d_weight, d_weight.new_zeros(ids - size, shape[1])])
    return spread(values, chosen, rows), (
        nothing if products.d_hidden is None else spread(products.d_hidden, chosen, rows).to(dtype),
        nothing.clone() if d_weight is None else d_weight.to(weight.dtype),
        nothing.clone() if d_bias is None else d_bias,
    )


@torch.library.custom_op("vlm::linear_distillation", mutates_args=())
def chunked_distillation(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], teacher: list[Tensor], mask: Optional[Tensor],  # noqa: UP045
    factors: Optional[Tensor], kind: str, divergence: str, temperature: float, mix: float, softcap: float,  # noqa: UP045
    teacher_softcap: float, chunk: int, product: torch.dtype, teacher_product: torch.dtype, native: bool,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden [N, C], weight [V, C]; teacher by `kind`: "factors" hidden, weight[, bias], "logits" [N, W], "top" logits and ids
    [N, K] -> factors * value [N], and the gradients of its sum that are wanted, empty where not."""
    want = (want_hidden, want_weight, want_bias and bias is not None)
    values, gradients = _sweep(
        hidden, weight, bias, teacher, kind, mask, factors, _How(divergence, temperature, mix, native), softcap,
        teacher_softcap, chunk, product, teacher_product, want,
    )  # fmt: skip
    if factors is not None:
        values = values * factors if mask is None else torch.where(mask, values * factors, 0.0)
    return values, *gradients


@chunked_distillation.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: list[Tensor], mask: Tensor | None, factors: Tensor | None,
    kind: str, divergence: str, temperature: float, mix: float, softcap: float, teacher_softcap: float, chunk: int,
    product: torch.dtype, teacher_product: torch.dtype, native: bool, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    values = hidden.new_empty(len(hidden), dtype=torch.promote_types(product, torch.float32))
    return (values, *gradient_shapes(hidden, weight, bias, product, (want_hidden, want_weight, want_bias)))


@torch.library.custom_op("vlm::linear_distillation_backward", mutates_args=())
def chunked_distillation_backward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], teacher: list[Tensor], mask: Optional[Tensor],  # noqa: UP045
    factors: Optional[Tensor], kind: str, divergence: str, temperature: float, mix: float, softcap: float,  # noqa: UP045
    teacher_softcap: float, chunk: int, product: torch.dtype, teacher_product: torch.dtype, native: bool,
    upstream: Tensor, made: list[Tensor], kept: bool, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, empty where not wanted. made: those of the forward pass, if `kept`."""
    used = torch.ones_like(upstream, dtype=torch.bool) if mask is None else mask
    want = (want_hidden, want_weight, want_bias)
    scale = uniform(upstream, used) if kept else None
    if scale is not None:
        found = [m * scale if w else m.new_empty(0) for m, w in zip(made, want)]
        return found[0], found[1], found[2]
    total = upstream if factors is None else torch.where(used, upstream * factors, 0.0)
    return _sweep(
        hidden, weight, bias, teacher, kind, mask, total, _How(divergence, temperature, mix, native), softcap,
        teacher_softcap, chunk, product, teacher_product, want,
    )[1]  # fmt: skip


@chunked_distillation_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, teacher: list[Tensor], mask: Tensor | None, factors: Tensor | None,
    kind: str, divergence: str, temperature: float, mix: float, softcap: float, teacher_softcap: float, chunk: int,
    product: torch.dtype, teacher_product: torch.dtype, native: bool, upstream: Tensor, made: list[Tensor], kept: bool,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return gradient_shapes(hidden, weight, bias, product, (want_hidden, want_weight, want_bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, teacher, mask, factors, *options, want_hidden, want_weight, want_bias = inputs
    ctx.save_for_backward(hidden, weight, bias, mask, factors, *output[1:], *teacher)
    ctx.options, ctx.made = tuple(options), (want_hidden, want_weight, want_bias)
    ctx.teachers = len(teacher)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_others: Tensor | None) -> tuple[Any, ...]:
    hidden, weight, bias, mask, factors, *rest = ctx.saved_tensors
    made, teacher = rest[:3], rest[3:]
    none = ([None] * ctx.teachers, None, None, *(None,) * (len(ctx.options) + 3))
    if upstream is None:
        return (None, None, None, *none)
    want = tuple(bool(w) for w in ctx.needs_input_grad[:3])
    kept = all(m or not w for m, w in zip(ctx.made, want)) and any(ctx.made)
    gradients = chunked_distillation_backward(
        hidden, weight, bias, teacher, mask, factors, *ctx.options, upstream.contiguous(), made, kept, *want
    )
    given = [g if w else None for g, w in zip(gradients, want)]
    if given[2] is not None:
        given[2] = given[2].to(bias.dtype)
    return (*given, *none)


chunked_distillation.register_autograd(_backward, setup_context=_save)
