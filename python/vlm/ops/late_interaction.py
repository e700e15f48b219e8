"""Token-wise late interaction: samples compared by the best match of each token. Source: core-filip.

R row samples of T tokens (pictures), C column samples of U tokens (texts), E width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import one_device, use_native
from vlm.ops.late_interaction_native import native_late_interaction
from vlm.ops.late_interaction_reference import late_interaction_reference

MOST_TOKENS = 65535
_SCORE_BYTES = 32 * 2**20


def late_interaction(
    v: Tensor,
    w: Tensor,
    *,
    mask_v: Tensor | None = None,
    mask_w: Tensor | None = None,
    mean: bool = True,
) -> tuple[Tensor, Tensor]:
    """Similarity of every row sample to every column sample, once from either side; no [R, C, T, U] tensor.

    v [R, T, E], w [C, U, E], bool masks [R, T] and [C, U] (true = a token that counts) -> two matrices [R, C], in
    float32 (float64 for float64 input). With s = <v_ia, w_jb> over tokens that count:
    rows[i, j] = sum over a of max over b of s, columns[i, j] = sum over b of max over a of s; with `mean` divided by
    the number of tokens that i, or j, has. The two differ in general: losses use the rows of one and the columns of
    the other. `mean=False` is ColBERT's MaxSim.

    Tokens are used as they are: normalise them for cosines. Masked tokens may hold anything, NaN included. A pair of
    which one side has no token gets 0 and gives no gradient; a token of NaN or infinity makes its sample's values NaN.
    Differentiable once in v and w; the gradient of a maximum goes to the first maximiser.
    Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(v, w, mask_v, mask_w)
    wide = torch.promote_types(v.dtype, torch.float32)
    v, w = v.to(wide), w.to(wide)
    if use_native(v, w):
        rows, columns, _ = native_late_interaction(v, w, mask_v, mask_w, mean)
        return rows, columns
    with torch.autocast(v.device.type, enabled=False):
        return late_interaction_reference(v, w, mask_v=mask_v, mask_w=mask_w, mean=mean)


@torch.no_grad()
def select_tokens(
    tokens: Tensor, others: Tensor, keep: int, *, mask: Tensor | None = None, mask_others: Tensor | None = None
) -> Tensor:
    """The tokens of each sample that match best anything on the other side; what FILIP sends to other ranks.

    tokens [R, T, E], others [C, U, E], bool masks -> indices [R, min(keep, T)], ascending, -1 as right padding where a
    sample has fewer tokens. A token's worth is its greatest product with any token of `others`; of equals the first stay.
    Scores are made some samples at a time, at most about 32 MiB of them.
    """
    _check(tokens, others, mask, mask_others)
    if keep < 1:
        raise ValueError(f"select_tokens: keep is {keep}; expected at least 1")
    samples, length, width = tokens.shape
    flat = others.reshape(-1, width) if mask_others is None else others[mask_others]
    worth = tokens.new_zeros((samples, length), dtype=torch.promote_types(tokens.dtype, torch.float32))
    step = max(1, _SCORE_BYTES // (4 * max(1, length * flat.shape[0])))
    for start in range(0, samples if flat.shape[0] else 0, step):
        part = tokens[start : start + step].to(worth.dtype) @ flat.to(worth.dtype).T
        worth[start : start + step] = part.amax(2)
    if mask is not None:
        worth = torch.where(mask, worth, float("-inf"))
    best = worth.argsort(dim=1, descending=True, stable=True)[:, :keep]
    there = torch.ones_like(best, dtype=torch.bool) if mask is None else mask.gather(1, best)
    ascending = torch.where(there, best, length).sort(dim=1).values
    return torch.where(ascending == length, -1, ascending)


def take_tokens(tokens: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [R, T, E], index [R, K] from `select_tokens` -> ([R, K, E], mask [R, K]); differentiable in tokens."""
    taken = tokens.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, tokens.shape[2]))
    return torch.where(index[..., None] >= 0, taken, torch.zeros_like(taken)), index >= 0


def _check(v: Tensor, w: Tensor, mask_v: Tensor | None, mask_w: Tensor | None) -> None:
    if v.ndim != 3 or w.ndim != 3 or v.shape[2] != w.shape[2]:
        raise ValueError(f"late interaction wants tokens [R, T, E] and [C, U, E], got {tuple(v.shape)} and {tuple(w.shape)}")
    if v.dtype != w.dtype or not v.is_floating_point():
        raise ValueError(f"late interaction: both sides must share one floating type, got {v.dtype} and {w.dtype}")
    one_device("late interaction", v, w, mask_v, mask_w)
    for name, tokens, mask in (("first", v, mask_v), ("second", w, mask_w)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != tokens.shape[:2]):
            raise ValueError(f"late interaction: the mask of the {name} side must be bool {list(tokens.shape[:2])}, "
                             f"got {mask.dtype} {tuple(mask.shape)}")
        if tokens.shape[1] > MOST_TOKENS:
            raise ValueError(f"late interaction: {tokens.shape[1]} tokens in a sample, at most {MOST_TOKENS}")
