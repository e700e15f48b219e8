"""Logits to logits, each a pure function over the last axis; a token that is out gets -inf.

n rows, V vocabulary. Sources: debias-lvlm (contrast and its cut-off), liquid (guidance, vocabulary mask).
"""

from __future__ import annotations

import math

import numpy as np


def restrict(logits: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """[..., V] with the tokens that bool `allowed` [V] denies at -inf."""
    return np.where(allowed, logits, logits.dtype.type(-np.inf))


def cut(logits: np.ndarray, reference: np.ndarray, share: float) -> np.ndarray:
    """[..., V] with -inf where `reference` < max(reference) + log(share): a probability below `share` of the greatest."""
    if share <= 0:
        return logits
    # log(share) is rounded, but at 1 it is exactly 0: then only the greatest stay.
    limit = reference.max(axis=-1, keepdims=True) + reference.dtype.type(math.log(share))
    return restrict(logits, reference >= limit)


def contrast(logits: np.ndarray, negative: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """(1 + alpha) l - alpha l', then the cut-off at `beta` by the ORIGINAL l. Both [..., V]. Source: debias-lvlm.

    Written l + alpha (l - l'), so that equal branches give l itself, bit for bit. Where either is not finite, l stays.
    """
    if alpha == 0:
        return cut(logits, logits, beta)
    usable = np.isfinite(logits) & np.isfinite(negative)
    if usable.all():
        mixed = logits + logits.dtype.type(alpha) * (logits - negative)
    else:
        difference = np.zeros_like(logits)
        np.subtract(logits, negative, out=difference, where=usable)
        mixed = logits + logits.dtype.type(alpha) * difference
    return cut(mixed, logits, beta)


def repetition_penalty(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """[V] with the positive logits of the ids `seen` divided by the penalty and the negative ones multiplied by it."""
    out = logits.copy()
    values = logits[seen]
    out[seen] = np.where(values > 0, values / penalty, values * penalty)
    return out


def temperature(logits: np.ndarray, value: float) -> np.ndarray:
    """[..., V] divided by a temperature above 0."""
    return logits / logits.dtype.type(value)


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """[..., V] with all but the k greatest at -inf; what equals the k-th stays too. k 0, or at least V: unchanged."""
    size = logits.shape[-1]
    if not 0 < k < size:
        return logits
    kth = np.partition(logits, size - k, axis=-1)[..., size - k, None]
    return restrict(logits, logits >= kth)


def top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """[..., V] with only the fewest likeliest tokens whose probabilities reach p; among equal ones lower ids first."""
    if p >= 1:
        return logits
    if logits.ndim > 1:
        rows = [top_p(row, p) for row in logits.reshape(-1, logits.shape[-1])]
        return np.stack(rows).reshape(logits.shape) if rows else logits
    probability = softmax(logits)
    # All tokens below (1 - p) / V together have less than 1 - p, so none of them is needed: few are left to sort.
    likely = np.sort(probability[probability >= (1 - p) / len(logits)])[::-1]
    count = min(int(np.searchsorted(np.cumsum(likely), p)) + 1, len(likely))
    # Sorting values is much faster than sorting places; only those equal to the last are counted off by place.
    kept = probability > likely[count - 1]
    equal = np.flatnonzero(probability == likely[count - 1])
    kept[equal[: count - np.count_nonzero(kept)]] = True
    return restrict(logits, kept)


def min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """[..., V] with the tokens below p times the greatest probability at -inf."""
    return cut(logits, logits, p)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities float64 [..., V]; -inf gives 0. At least one logit of a row must be finite."""
    x = np.exp(logits - logits.max(axis=-1, keepdims=True).astype(np.float64))
    x /= x.sum(axis=-1, keepdims=True)
    return x


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 [..., V]; -inf stays."""
    x = logits - logits.max(axis=-1, keepdims=True).astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
