"""The chunked losses over the vocabulary as torch operators: products by torch, the rows of a chunk by `vocabulary_rows`.

N rows, C width, V ids, r rows of a chunk. Logits [N, V] never exist. The gradients of `loss.sum()` are made in the forward pass,
while a chunk of logits is at hand: three products in all. The backward pass multiplies them by the upstream gradient if that is
the same number for every row, and otherwise computes the chunks again.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core
from vlm.ops.vocabulary_rows import Shape, cross_entropy_rows

CHUNK = 2**24
"""Logits held at once, in elements (64 MiB of float32)."""


def chunk_rows(rows: int, ids: int, chunk: int) -> int:
    """How many rows of `ids` logits fit into `chunk` elements, at least one."""
    return max(1, min(rows, chunk // max(1, ids)))


class Products:
    """hidden [N, C] with weight [V, C]: chunks of products and the gradients of both, accumulated over chunks.

    product: the type of what is multiplied, by torch; sums over chunks are float32 at least. With `native`, float32 is multiplied
    by the core (but at the portable level), and so is bfloat16 where the level in force does that: its products and gradients are
    float32 and never rounded on their way.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, product: torch.dtype, want_hidden: bool, want_weight: bool,
                 native: bool = False) -> None:
        self.wide = torch.promote_types(product, torch.float32)
        self.product = product
        self.hidden, self.weight = hidden.to(product), weight.to(product)
        # torch's float32 product reached half of the tile product's speed where it was measured, see docs/kernels/vocabulary.md.
        half = product == torch.bfloat16
        self.in_core = native and (core().multiplies_bfloat16() if half else
                                   product == torch.float32 and core().active_level() != "portable")
        self.product_rows = "product_rows" if half else "float_product_rows"
        self.product_gradients = "product_gradients" if half else "float_product_gradients"
        if self.in_core:
            self.hidden, self.weight = _readable(self.hidden), _readable(self.weight)
        self.d_hidden = hidden.new_empty(hidden.shape, dtype=self.wide) if want_hidden else None
        self.d_weight = weight.new_zeros(weight.shape, dtype=self.wide) if want_weight else None

    def into(self, chunk: Tensor, begin: int) -> None:
        """chunk [r, V] <- hidden[begin : begin + r] weight^T"""
        part = self.hidden[begin : begin + len(chunk)]
        if self.in_core:
            getattr(core(), self.product_rows)(**self._operands(part), z=_block(chunk))
        elif self.product == self.wide:
            torch.mm(part, self.weight.T, out=chunk)
        else:
            chunk.copy_(part @ self.weight.T)

    def add(self, gradient: Tensor, begin: int) -> None:
        """gradient [r, V] of the products of the rows from `begin` on."""
        part = self.hidden[begin : begin + len(gradient)]
        if self.in_core:
            own = None if self.d_hidden is None else self.d_hidden[begin : begin + len(gradient)]
            getattr(core(), self.product_gradients)(**self._operands(part), gradient=_block(gradient), d_hidden=_block(own),
                                     d_weight=_block(self.d_weight))  # fmt: skip
            return
        gradient = gradient.to(self.product)
        if self.d_hidden is not None:
            own = self.d_hidden[begin : begin + len(gradient)]
            if self.product == self.wide:
                torch.mm(gradient, self.weight, out=own)
            else:
                own.copy_(gradient @ self.weight)
        if self.d_weight is not None:
            if self.product == self.wide:
                self.d_weight.addmm_(gradient.T, part)
            else:
                self.d_weight.add_(gradient.T @ part)

    def _operands(self, part: Tensor) -> dict[str, Any]:
        return {"rows": len(part), "ids": len(self.weight), "width": part.shape[1], "hidden": _block(part),
                "weight": _block(self.weight), "threads": torch.get_num_threads()}  # fmt: skip


def _readable(t: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return t if t.stride(1) == 1 or t.shape[1] <= 1 else t.contiguous()


def _block(t: Tensor | None) -> tuple[int, int]:
    """Address and row stride as the core takes them, zeros for what is not wanted."""
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of hidden, weight and bias; empty where not wanted."""


def _sweep(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, shape: Shape, chunk: int,
    product: torch.dtype, native: bool, want: tuple[bool, bool, bool],
) -> tuple[tuple[Tensor, Tensor, Tensor], Gradients]:  # fmt: skip
    """Losses [N] and, where wanted, gradients of `(factors * loss).sum()`. Rows with label -1 are not read."""
    rows, chosen = len(hidden), chosen_rows(labels)
    if chosen is not None:
        hidden, labels = hidden[chosen], labels[chosen]
        factors = None if factors is None else factors[chosen]
    gradient = any(want)
    with torch.autocast(hidden.device.type, enabled=False):
        products = Products(hidden, weight, product, *want[:2], native=native)
        wide = products.wide
        bias = None if bias is None else bias.to(wide).contiguous()
        labels, factors = labels.contiguous(), None if factors is None else factors.to(wide).contiguous()
        d_bias = None if bias is None or not want[2] else torch.zeros_like(bias)
        size = chunk_rows(len(hidden), len(weight), chunk)
        buffer = hidden.new_empty((size, len(weight)), dtype=wide)
        columns = tuple(hidden.new_empty(len(hidden), dtype=wide) for _ in range(3))
        for begin in range(0, len(hidden), size):
            part = slice(begin, min(begin + size, len(hidden)))
            z = buffer[: part.stop - begin]
            products.into(z, begin)
            own = None if factors is None else factors[part]
            found = cross_entropy_rows(z, bias, labels[part], own, shape, gradient=gradient, native=native)
            for column, values in zip(columns, found):
                column[part] = values
            if gradient:
                products.add(z, begin)
            if d_bias is not None:
                d_bias += z.sum(0)
    outputs = tuple(spread(column, chosen, rows) for column in columns)
    d_hidden = products.d_hidden
    nothing = hidden.new_empty(0)
    gradients = (
        nothing if d_hidden is None else spread(d_hidden, chosen, rows).to(hidden.dtype),
        nothing.clone() if products.d_weight is None else products.d_weight.to(weight.dtype),
        nothing.clone() if d_bias is None else d_bias,
    )
    return outputs, gradients  # type: ignore[return-value]


def chosen_rows(labels: Tensor) -> Tensor | None:
    """The places of the labels that are not ignored (-1), None where that is all of them. Looks at the values."""
    used = labels >= 0
    return None if bool(used.all()) else used.nonzero()[:, 0]


def spread(values: Tensor, chosen: Tensor | None, rows: int) -> Tensor:
    """Values of the chosen rows among zeros."""
    if chosen is None:
        return values
    return values.new_zeros((rows, *values.shape[1:])).index_copy_(0, chosen, values)


def gradient_shapes(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, product: torch.dtype, want: tuple[bool, bool, bool]
) -> Gradients:
    """Uninitialised gradients of the shapes and types that a sweep gives."""
    wide = torch.promote_types(product, torch.float32)
    return (
        hidden.new_empty(hidden.shape if want[0] else (0,)),
        weight.new_empty(weight.shape) if want[1] else hidden.new_empty(0),
        hidden.new_empty(bias.shape, dtype=wide) if want[2] and bias is not None else hidden.new_empty(0),
    )


@torch.library.custom_op("vlm::linear_cross_entropy", mutates_args=())
def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, factors: Optional[Tensor],  # noqa: UP045
    smoothing: float, z_loss: float, softcap: float, chunk: int, product: torch.dtype, native: bool,
    want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """hidden [N, C], weight [V, C], labels [N] (-1: ignored) -> factors * loss, log_p, lse, each [N], and the gradients of the
    first one's sum that are wanted, empty where not."""
    want = (want_hidden, want_weight, want_bias and bias is not None)
    (loss, log_p, lse), gradients = _sweep(
        hidden, weight, bias, labels, factors, Shape(smoothing, z_loss, softcap), chunk, product, native, want
    )
    # What an ignored row's factor is does not matter, not even NaN.
    loss = loss if factors is None else torch.where(labels >= 0, loss * factors, 0.0)
    return loss, log_p, lse, *gradients


@chunked_cross_entropy.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, smoothing: float,
    z_loss: float, softcap: float, chunk: int, product: torch.dtype, native: bool, want_hidden: bool, want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = [hidden.new_empty(len(hidden), dtype=torch.promote_types(product, torch.float32)) for _ in range(3)]
    return (*rows, *gradient_shapes(hidden, weight, bias, product, (want_hidden, want_weight, want_bias)))


@torch.library.custom_op("vlm::linear_cross_entropy_backward", mutates_args=())
def chunked_cross_entropy_backward(
    hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor, factors: Optional[Tensor],  # noqa: UP045
    smoothing: float, z_loss: float, softcap: float, chunk: int, product: torch.dtype, native: bool,
    upstream: Tensor, made: list[Tensor], kept: bool, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of hidden, weight and bias, empty where not wanted. made: those of the forward pass, if `kept`."""
    want = (want_hidden, want_weight, want_bias)
    used = labels >= 0
    scale = uniform(upstream, used) if kept else None
    if scale is not None:
        found = [m * scale if w else m.new_empty(0) for m, w in zip(made, want)]
        return found[0], found[1], found[2]
    total = upstream if factors is None else torch.where(used, upstream * factors, 0.0)
    _, gradients = _sweep(
        hidden, weight, bias, labels, total, Shape(smoothing, z_loss, softcap), chunk, product, native, want
    )
    return gradients


def uniform(upstream: Tensor, used: Tensor) -> Tensor | None:
    """The number that `upstream` holds at all used places, 1 if there is no such place, None where they differ."""
    values = upstream[used]
    if not len(values):
        return upstream.new_ones(())
    return values[0] if bool((values == values[0]).all()) else None


@chunked_cross_entropy_backward.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, smoothing: float,
    z_loss: float, softcap: float, chunk: int, product: torch.dtype, native: bool, upstream: Tensor, made: list[Tensor],
    kept: bool, want_hidden: bool, want_weight: bool, want_bias: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return gradient_shapes(hidden, weight, bias, product, (want_hidden, want_weight, want_bias))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, factors, *options, want_hidden, want_weight, want_bias = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, factors, *output[3:])
    ctx.options, ctx.made = tuple(options), (want_hidden, want_weight, want_bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, factors, *made = ctx.saved_tensors
    none = (None,) * (6 + 3)
    if upstream is None:
        return (None,) * 5 + none
    want = tuple(bool(w) for w in ctx.needs_input_grad[:3])
    kept = all(m or not w for m, w in zip(ctx.made, want)) and any(ctx.made)
    gradients = chunked_cross_entropy_backward(
        hidden, weight, bias, labels, factors, *ctx.options, upstream.contiguous(), list(made), kept, *want
    )
    given = [g if w else None for g, w in zip(gradients, want)]
    if given[2] is not None:
        given[2] = given[2].to(bias.dtype)
    return (*given, None, None, *none)


chunked_cross_entropy.register_autograd(_backward, setup_context=_save)
