"""Statistics of the attention matrix, which is never stored. None of them has a gradient: they choose, they do not train.

B batch, H query heads, G key heads (H a multiple of G), N queries, M keys, D width. P_ij = exp(s_ij - lse_i) over the
allowed pairs, s_ij = (cap(scale * <q_i, k_j>) + bias_ij) / temperature.

Options shared by all, as `vlm.ops.attention` takes them: causal, alignment, key_mask (bool [B, M] or lengths [B]), mask (an atom
or a program of `vlm.ops.masks`), bias (broadcastable to [B, H, N, M], or one of `vlm.ops.attention_bias`), scale (1/sqrt(D)),
softcap; and temperature, which divides the logits after mask and bias. What a removed key holds is not read where key_mask or
`KeyPadding` removes it.
Half-precision input is converted to float32 as a whole tensor. Results are float32 (float64 for float64 input).
ValueError on shapes or dtypes that do not fit. Sources: core-exact-attention, aim, fopru.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from vlm.ops.attention_bias import AnyBias, lowered, narrowed, written_out
from vlm.ops.attention_native import cuda_attends
from vlm.ops.attention_reference import default_scale
from vlm.ops.backend import one_device, use_native
from vlm.ops.cuda_core import cuda_kernels_of
from vlm.ops.masks import Alignment, Atom, LoweredMask, MaskProgram, MaskShape, key_mask_of
from vlm.ops.statistics_native import native_column_sums, native_row_statistics, native_rows
from vlm.ops.statistics_reference import (
    along,
    column_sums_reference,
    logits_reference,
    probabilities_reference,
    row_statistics_reference,
    rows_reference,
)


class AttentionOptions(TypedDict, total=False):
    """What all statistics take by keyword, see the module."""

    causal: bool
    alignment: Alignment
    key_mask: Tensor | None
    mask: MaskProgram | Atom | None
    bias: AnyBias | None
    scale: float | None
    softcap: float | None
    temperature: float


class RowStatistics(NamedTuple):
    """Of every query: log-sum-exp [B, H, N] (-inf for an empty row), entropy in nats (0), best key int64 (-1)."""

    lse: Tensor
    entropy: Tensor
    best: Tensor


class Focus(NamedTuple):
    """Attention that tokens receive and pay, [B, N - C], and by which of the two they differ more, bool [B]."""

    received: Tensor
    paid: Tensor
    by_received: Tensor

    @property
    def score(self) -> Tensor:
        """[B, N - C], of each sequence the one of larger variance."""
        return torch.where(self.by_received[:, None], self.received, self.paid)


@torch.no_grad()
def attention_column_sums(q: Tensor, k: Tensor, *, weights: Tensor | None = None, lse: Tensor | None = None,
                          **options: Unpack[AttentionOptions]) -> Tensor:
    """The attention that every key receives: sum_i weights_i P_ij, [B, H, M].

    weights: broadcastable to [B, H, N], all 1 by default; a query of weight 0 is not read, whatever it holds.
    lse: [B, H, N] of the same options and temperature, as `attention(return_lse=True)` gives it; computed if not given.
    """
    one_device("attention statistics", q, weights, lse)
    p = _prepare(q, k, options)
    weights = None if weights is None else _expanded("weights", weights, q)
    lse = None if lse is None else _expanded("lse", lse, q)
    return _column_sums(p, weights, lse)


@torch.no_grad()
def attention_row_statistics(q: Tensor, k: Tensor, **options: Unpack[AttentionOptions]) -> RowStatistics:
    """Log-sum-exp, entropy and best key of every query in one streaming pass."""
    return _row_statistics(_prepare(q, k, options), everything=True)


def attention_lse(q: Tensor, k: Tensor, **options: Unpack[AttentionOptions]) -> Tensor:
    """log sum_j exp(s_ij), [B, H, N], without values and without a gradient."""
    with torch.no_grad():
        return _row_statistics(_prepare(q, k, options), everything=False).lse


def attention_entropy(q: Tensor, k: Tensor, **options: Unpack[AttentionOptions]) -> Tensor:
    """-sum_j P_ij log P_ij of every query, [B, H, N], in nats; 0 for a query with no allowed key."""
    return attention_row_statistics(q, k, **options).entropy


@torch.no_grad()
def attention_rows(q: Tensor, k: Tensor, rows: Tensor, **options: Unpack[AttentionOptions]) -> Tensor:
    """P of chosen queries: rows int64 [R] or [B, R] -> [B, H, R, M]. Row -1 stands for none and gives zeros."""
    p = _prepare(q, k, options)
    rows = _indices("rows", rows, q.shape[0])
    if p.native and not p.cuda:
        one_device("attention statistics", q, rows)
        return native_rows(*p.native_arguments(), rows)
    return _plain(p, lambda: rows_reference(p.q, p.k, rows, **p.twin_arguments()))


@torch.no_grad()
def attention_columns(q: Tensor, k: Tensor, columns: Tensor, **options: Unpack[AttentionOptions]) -> Tensor:
    """P of chosen keys: columns int64 [C] or [B, C], none negative -> [B, H, N, C], through one lse.

    P comes from that lse: of a row whose lse is far from 0 (1e4 and more) it has only the digits that lse has left.
    What a mask program allows is written out here, as booleans [B | 1, H | 1, N, M]; so is a bias on a grid.
    """
    p = _prepare(q, k, options)
    at = _indices("columns", columns, q.shape[0])
    lse = _row_statistics(p, everything=False).lse
    picked = p.k.gather(2, at[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3]))
    mask = None if p.key_mask is None else p.key_mask.gather(1, at)
    pairs = along(p.pairs(), 3, at)
    bias = along(p.written_bias(), 3, at)
    logits = _plain(p, lambda: logits_reference(p.q, picked, causal=False, alignment="top-left", key_mask=mask, bias=bias,
                                                scale=p.scale, pairs=pairs, softcap=p.softcap))
    if p.causal:
        i = torch.arange(q.shape[2], device=q.device)[:, None] + p.offset
        logits = torch.where(at[:, None, None, :] <= i, logits, torch.full_like(logits[..., :1, :1], -torch.inf))
    return probabilities_reference(logits, lse)


@torch.no_grad()
def attention_pagerank(q: Tensor, k: Tensor, *, iterations: int = 5, damping: float = 0.0,
                       **options: Unpack[AttentionOptions]) -> Tensor:
    """x_{t+1} = (1 - damping) x_t P + damping / n from x_0 = 1/n, `iterations` times: [B, H, N], each sums to 1.

    q and k are of the same tokens (N = M); n counts those that `key_mask` and `KeyPadding` keep, the others have 0 throughout. One
    lse, then one weighted column sum a step. A token that a mask lets attend to none gives its mass to none. Do not iterate to
    convergence on a causal matrix: all mass ends on token 0.
    Source: aim (temperature 0.1, 5 iterations, no damping).
    """
    p = _prepare(q, k, options)
    if q.shape[2] != k.shape[2]:
        raise ValueError(f"attention_pagerank wants queries and keys of the same tokens, got {q.shape[2]} and {k.shape[2]}")
    if iterations < 0 or not 0 <= damping <= 1:
        raise ValueError(f"attention_pagerank: iterations {iterations} must not be negative, damping {damping} in 0..1")
    wide = torch.promote_types(p.q.dtype, torch.float32)
    keep = torch.ones(q.shape[0], k.shape[2], dtype=torch.bool, device=q.device) if p.key_mask is None else p.key_mask
    start = (keep.to(wide) / keep.sum(1, keepdim=True).clamp(min=1)).to(wide)[:, None, :].expand(-1, q.shape[1], -1)
    rank = start
    if iterations == 0:
        return rank.clone()
    lse = _row_statistics(p, everything=False).lse
    for _ in range(iterations):
        rank = _column_sums(p, rank, lse)
        if damping:
            rank = (1 - damping) * rank + damping * start
    return rank


@torch.no_grad()
def attention_focus(q: Tensor, k: Tensor, *, leading: int = 0, **options: Unpack[AttentionOptions]) -> Focus:
    """Head means of the attention that N - C tokens receive from and pay to one another; C = `leading` class tokens.

    received_j = mean_i A_ij and paid_i = mean_j A_ij over the tokens after the leading ones, where A is P, not normalised
    again: paid_i = (1 - what i pays to the leading tokens) / (N - C), the constant 1/N without them.
    Variation that is only rounding (below 1e-5 of the mean) never wins. Source: fopru.
    """
    p = _prepare(q, k, options)
    if q.shape[2] != k.shape[2] or not 0 <= leading < max(q.shape[2], 1):
        raise ValueError(f"attention_focus wants one set of tokens and leading < N, got {q.shape[2]} queries, "
                         f"{k.shape[2]} keys, leading {leading}")
    lse = _row_statistics(p, everything=False).lse
    count = q.shape[2] - leading
    weights = torch.full_like(lse, 1 / max(count, 1))
    weights[..., :leading] = 0
    received = _column_sums(p, weights, lse)[..., leading:].mean(1)
    lost = torch.zeros_like(lse)
    if leading:
        lost = attention_columns(q, k, torch.arange(leading, device=q.device), **options).sum(-1)
    paid = torch.where(lse == -torch.inf, torch.zeros_like(lse), 1 - lost)[..., leading:].mean(1) / max(count, 1)
    if count == 0:
        return Focus(received, paid, torch.ones(q.shape[0], dtype=torch.bool, device=q.device))
    spread, noise = paid.std(1, correction=0), 1e-5 * paid.mean(1).abs()
    return Focus(received, paid, (spread <= noise) | (spread <= received.std(1, correction=0)))


class _Problem(NamedTuple):
    q: Tensor
    k: Tensor
    key_mask: Tensor | None
    mask: MaskProgram | None
    bias: AnyBias | None
    scale: float
    softcap: float
    temperature: float
    causal: bool
    alignment: Alignment
    native: bool
    cuda: bool  # compiled kernels of a GPU: they have no rows, entropies and best keys

    @property
    def shape(self) -> MaskShape:
        return MaskShape(self.q.shape[0], self.q.shape[1], self.q.shape[2], self.k.shape[2], self.q.device)

    @property
    def offset(self) -> int:
        return self.k.shape[2] - self.q.shape[2] if self.alignment == "bottom-right" else 0

    def pairs(self) -> Tensor | None:
        """What the program allows, bool [B | 1, H | 1, N | 1, M | 1]."""
        return None if self.mask is None else self.mask.allow(self.shape)

    def written_bias(self) -> Tensor | None:
        bias = written_out(self.bias, self.shape)
        return bias if bias is None else self._cooled(bias)

    def native_arguments(self) -> tuple[Any, ...]:
        pairs, relative = lowered(self.bias, self.shape, grids=not self.cuda)
        bias = None if pairs is None else self._cooled(narrowed(pairs, torch.float32))
        values, grid = (None, (0, 0)) if relative is None else (self._cooled(narrowed(relative.values, torch.float32)), relative.grid)
        code, arrays, dense = LoweredMask([], None, None) if self.mask is None else self.mask.lower(self.shape)
        one_device("attention statistics: mask", self.q, arrays, dense, self.key_mask)
        return (self.q, self.k, self.key_mask, bias, values, arrays, dense, code or None, self.scale, self.causal, self.offset, *grid,
                self.softcap)

    def twin_arguments(self) -> dict[str, Any]:
        return {"causal": self.causal, "alignment": self.alignment, "key_mask": self.key_mask, "bias": self.written_bias(),
                "scale": self.scale, "pairs": self.pairs(), "softcap": self.softcap}

    def _cooled(self, bias: Tensor) -> Tensor:
        if self.temperature == 1.0:
            return bias
        cooled = bias / self.temperature  # a low one stays finite, for -inf removes its pair
        return torch.where(bias == -torch.inf, bias, cooled.clamp(min=torch.finfo(bias.dtype).min))


def _prepare(q: Tensor, k: Tensor, options: AttentionOptions) -> _Problem:
    unknown = set(options) - set(AttentionOptions.__annotations__)
    if unknown:
        raise TypeError(f"attention statistics: unexpected option {sorted(unknown)[0]!r}")
    bias, mask, softcap = options.get("bias"), options.get("mask"), options.get("softcap")
    alignment, temperature = options.get("alignment", "bottom-right"), options.get("temperature", 1.0)
    given = bias if isinstance(bias, Tensor) else None
    one_device("attention statistics", q, k, options.get("key_mask"), given)
    key_mask = _check(q, k, alignment, options.get("key_mask"), given, temperature, softcap)
    if isinstance(mask, Atom):
        mask = MaskProgram(mask)
    atoms = 0 if mask is None else len(mask.atoms)
    native = use_native(q, k, given, cuda=lambda: cuda_attends(q, 0, atoms, softcap is not None))
    cuda = native and cuda_kernels_of(q) is not None
    if native:
        q, k = q.float(), k.float()
    scale = options.get("scale")
    scale = (default_scale(q.shape[3]) if scale is None else scale) / temperature
    problem = _Problem(q, k, key_mask, mask, bias, scale, (softcap or 0.0) / temperature, temperature, options.get("causal", False),
                       alignment, native, cuda)
    padding = None if mask is None else mask.key_mask(problem.shape)
    if padding is not None:
        problem = problem._replace(key_mask=padding if key_mask is None else key_mask & padding)
    return problem


def _check(q: Tensor, k: Tensor, alignment: str, key_mask: Tensor | None, bias: Tensor | None,
           temperature: float, softcap: float | None) -> Tensor | None:
    """Refuse what does not fit; returns the key mask as bool [B, M] or None."""
    if q.ndim != 4 or k.ndim != 4 or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"attention statistics want q [B, H, N, D] and k [B, G, M, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"attention statistics: {q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if q.dtype != k.dtype or not q.is_floating_point():
        raise ValueError(f"attention statistics: q and k must share one floating type, got {q.dtype} and {k.dtype}")
    if alignment not in ("bottom-right", "top-left"):
        raise ValueError(f"attention statistics: alignment is {alignment!r}; expected 'bottom-right' or 'top-left'")
    if not temperature > 0:
        raise ValueError(f"attention statistics: temperature is {temperature}, expected more than 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"attention statistics: softcap is {softcap}; expected a positive number or None")
    if bias is not None:
        full = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if not bias.is_floating_point() or bias.ndim != 4 or any(b not in (1, n) for b, n in zip(bias.shape, full)):
            raise ValueError(f"attention statistics: bias {bias.dtype} {tuple(bias.shape)} cannot be broadcast to {full}")
    if key_mask is None:
        return None
    shape = MaskShape(q.shape[0], q.shape[1], q.shape[2], k.shape[2], q.device)
    return key_mask_of(key_mask, shape, "attention statistics: key_mask")


def _expanded(name: str, t: Tensor, q: Tensor) -> Tensor:
    if t.ndim > 3 or t.is_complex() or any(n not in (1, full) for n, full in zip(reversed(t.shape), reversed(q.shape[:3]))):
        raise ValueError(f"attention statistics: {name} {tuple(t.shape)} cannot be broadcast to {tuple(q.shape[:3])}")
    return t.to(torch.promote_types(q.dtype, torch.float32)).expand(q.shape[:3])


def _indices(name: str, at: Tensor, batch: int) -> Tensor:
    if at.is_floating_point() or at.is_complex() or at.dtype == torch.bool or at.ndim not in (1, 2) or (at.ndim == 2 and at.shape[0] != batch):
        raise ValueError(f"attention statistics: {name} must be integers [R] or [{batch}, R], got {at.dtype} {tuple(at.shape)}")
    return at.long().expand(batch, -1)


def _plain(p: _Problem, work: Any) -> Any:
    with torch.autocast(p.q.device.type, enabled=False):
        return work()


def _logits(p: _Problem) -> Tensor:
    return logits_reference(p.q, p.k, **p.twin_arguments())


def _row_statistics(p: _Problem, everything: bool) -> RowStatistics:
    if p.native and not (p.cuda and everything):
        return RowStatistics(*native_row_statistics(*p.native_arguments(), everything))
    return _plain(p, lambda: RowStatistics(*row_statistics_reference(_logits(p))))


def _column_sums(p: _Problem, weights: Tensor | None, lse: Tensor | None) -> Tensor:
    if p.native:
        lse = _row_statistics(p, everything=False).lse if lse is None else lse
        return native_column_sums(*p.native_arguments(), lse, weights)
    return _plain(p, lambda: column_sums_reference(_logits(p), lse, weights))
