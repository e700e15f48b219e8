"""Statistics of the attention matrix in plain torch operators, which hold the matrix: the twins of the native kernels.

B batch, H query heads, G key heads, N queries, M keys, D width, R chosen rows. Any floating type and device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.attention_bias import narrowed
from vlm.ops.attention_reference import allowed_pairs

_LARGEST_WHOLE_LSE = 1024.0
"""The sum of the exponentials is lost in the last bits of an lse beyond; then P is not made from it."""


def logits_reference(q: Tensor, k: Tensor, *, causal: bool, alignment: str, key_mask: Tensor | None, bias: Tensor | None,
                     scale: float, pairs: Tensor | None = None, softcap: float = 0.0) -> Tensor:
    """cap(scale * q k^T) + bias [B, H, N, M], at least float32, -inf at removed pairs.

    pairs: bool [B | 1, H | 1, N | 1, M | 1], what a mask program allows. softcap: 0 for none.
    """
    work = torch.promote_types(q.dtype, torch.float32)
    if key_mask is not None:  # removed keys may hold anything, NaN included
        k = torch.where(key_mask[:, None, :, None], k, torch.zeros((), dtype=k.dtype, device=k.device))
    repeat = q.shape[1] // k.shape[1]
    if repeat != 1:
        k = k.repeat_interleave(repeat, 1)
    logits = (q.to(work) @ k.to(work).transpose(-1, -2)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + narrowed(bias, work)
    allow = allowed_pairs(q.shape[2], k.shape[2], causal=causal, alignment=alignment, key_mask=key_mask, device=q.device)
    if pairs is not None:
        allow = pairs if allow is None else allow & pairs
    if allow is None:
        return logits
    return torch.where(allow, logits, torch.full((), -torch.inf, dtype=work, device=q.device))


def row_statistics_reference(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logits [..., N, M] -> lse, entropy and best key, [..., N]; an empty row gives -inf, 0 and -1."""
    if logits.shape[-1] == 0:
        none = logits.sum(-1)
        return torch.full_like(none, -torch.inf), torch.zeros_like(none), torch.full_like(none, -1, dtype=torch.int64)
    lse = _lse(logits)
    alive = lse != -torch.inf
    log_p = torch.log_softmax(torch.where(alive[..., None], logits, torch.zeros_like(logits)), -1)
    terms = torch.where(logits == -torch.inf, torch.zeros_like(logits), -log_p * log_p.exp())
    best = torch.where(alive, logits.argmax(-1), -1)
    return lse, terms.sum(-1), best


def _lse(logits: Tensor) -> Tensor:
    return torch.logsumexp(logits, -1) if logits.shape[-1] else torch.full_like(logits.sum(-1), -torch.inf)


def probabilities_reference(logits: Tensor, lse: Tensor | None = None) -> Tensor:
    """exp(logits - lse) [..., N, M]; rows without an allowed key are zeros."""
    if lse is None:
        alive = (logits != -torch.inf).any(-1, keepdim=True)
        return torch.where(alive, torch.softmax(torch.where(alive, logits, torch.zeros_like(logits)), -1), torch.zeros_like(logits))
    lse = lse.to(logits.dtype)
    alive = (lse != -torch.inf)[..., None]
    shifted = logits - torch.where(alive, lse[..., None], torch.zeros_like(lse)[..., None])
    return torch.where(alive & (logits != -torch.inf), shifted.exp(), torch.zeros_like(logits))


def column_sums_reference(logits: Tensor, lse: Tensor | None, weights: Tensor | None) -> Tensor:
    """sum_i weights_i P_ij, [B, H, M]; rows of weight 0 are left out, whatever they hold."""
    p = probabilities_reference(logits, lse)
    if lse is not None:
        far = (lse.abs() > _LARGEST_WHOLE_LSE) & (lse != -torch.inf)
        p = torch.where(far[..., None], probabilities_reference(logits), p)
    if weights is None:
        return p.sum(-2)
    w = weights.to(p.dtype)[..., None]
    return torch.where(w != 0, w * p, torch.zeros_like(p)).sum(-2)


def rows_reference(q: Tensor, k: Tensor, rows: Tensor, *, causal: bool, alignment: str, key_mask: Tensor | None,
                   bias: Tensor | None, scale: float, pairs: Tensor | None = None, softcap: float = 0.0) -> Tensor:
    """P of the chosen rows [B, R], [B, H, R, M]; a row of -1 is a row of zeros."""
    if not torch.compiler.is_exporting() and q.shape[2] == 0:  # then every row is -1
        return q.new_zeros((q.shape[0], q.shape[1], rows.shape[1], k.shape[2]), dtype=torch.promote_types(q.dtype, torch.float32))
    at = rows.clamp(min=0)
    chosen = q.gather(2, at[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
    logits = logits_reference(chosen, k, causal=False, alignment=alignment, key_mask=key_mask, bias=along(bias, 2, at), scale=scale,
                              pairs=along(pairs, 2, at), softcap=softcap)
    allow = (rows >= 0)[:, None, :, None]
    if causal:
        offset = k.shape[2] - q.shape[2] if alignment == "bottom-right" else 0
        allow = allow & (torch.arange(k.shape[2], device=q.device) <= rows[:, None, :, None] + offset)
    return probabilities_reference(torch.where(allow, logits, torch.full_like(logits[..., :1, :1], -torch.inf)))


def along(t: Tensor | None, axis: int, at: Tensor) -> Tensor | None:
    """t [B | 1, H | 1, N | 1, M | 1] at the places `at` [B, R] of axis 2 or 3; itself where that axis is shared."""
    if t is None or t.shape[axis] == 1:
        return t
    t = t.expand(at.shape[0], -1, -1, -1)
    if axis == 2:
        return t.gather(2, at[:, None, :, None].expand(-1, t.shape[1], -1, t.shape[3]))
    return t.gather(3, at[:, None, None, :].expand(-1, t.shape[1], t.shape[2], -1))
