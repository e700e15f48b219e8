"""Relations between the positions of one picture: Z Z^T, compared between two models.

P positions of a picture, V ids, C width. Source: llava-kd.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.objectives.vocabulary import CHUNK, detached, exact, logits_of
from vlm.types import Vocabulary


def feature_relation(student: Tensor, teacher: Tensor) -> Tensor:
    """student [P, A], teacher [P, B] -> 1 - cos(vec(Z Z^T), vec(Y Y^T)), a scalar.

    <Z Z^T, Y Y^T> = |Z^T Y|^2, so only matrices of the smaller kind are made: [P, P], or [A, B] where both widths are below P.
    """
    z, y = exact(student), exact(teacher)
    if max(z.shape[1], y.shape[1]) < z.shape[0]:
        cross = _norm(z.T @ y)
        return 1 - (cross / _norm(z.T @ z)) * (cross / _norm(y.T @ y))
    return gram_distance(z @ z.T, y @ y.T)


def gram_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of two matrices [P, P], a scalar; each is brought to length 1 first, so that no product overflows."""
    return 1 - ((student / _norm(student)) * (teacher / _norm(teacher))).sum()


def logit_relation(
    student: tuple[Vocabulary, Tensor], teacher: tuple[Vocabulary, Tensor], *, chunk: int = CHUNK
) -> Tensor:
    """The relation of raw logits of one picture, each side (vocabulary, hidden [P, C]); a scalar.

    Logits are neither normalised nor softmaxed. Ids beyond the smaller vocabulary are left out, and a logit at -inf counts as 0.
    The teacher gets no gradient. Logits [P, V] are neither kept for the backward pass nor, where V is great, made at once.
    """
    size = min(student[0].weight.shape[0], teacher[0].weight.shape[0])
    own, other = student, (detached(teacher[0]), teacher[1].detach())
    if size < len(own[1]):

        def small(hidden: Tensor) -> Tensor:
            ids = slice(size)
            return feature_relation(_finite(own[0], hidden, ids), _finite(other[0], other[1], ids))

        return _recomputed(small, own[1])
    with torch.no_grad():
        taught = logit_gram(*other, size, chunk=chunk)
    return gram_distance(logit_gram(*own, size, chunk=chunk), taught)


def logit_gram(vocabulary: Vocabulary, hidden: Tensor, size: int, *, chunk: int = CHUNK) -> Tensor:
    """hidden [P, C] -> Z Z^T [P, P] of the logits Z of the first `size` ids, summed over slices of the ids."""
    step = max(1, chunk // max(1, len(hidden)))

    def part(hidden: Tensor, ids: slice) -> Tensor:
        z = _finite(vocabulary, hidden, ids)
        return z @ z.T

    parts = [_recomputed(part, hidden, slice(start, min(start + step, size))) for start in range(0, size, step)]
    return sum(parts[1:], parts[0])


def _recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """function(*arguments), computed again in the backward pass."""
    out = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out


def _finite(vocabulary: Vocabulary, hidden: Tensor, ids: slice) -> Tensor:
    logits = logits_of(vocabulary, hidden, ids)
    return logits.masked_fill(logits == -math.inf, 0.0)


def _norm(matrix: Tensor) -> Tensor:
    """Frobenius norm, kept from 0 so that a quotient is finite."""
    return torch.linalg.norm(matrix).clamp(min=torch.finfo(matrix.dtype).tiny)
