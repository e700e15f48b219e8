"""Targets of the contrastive objective in the form of the operators: shares of columns, a teacher's few likely pairs.

n rows of a stream, r rows and c columns of a comparison, K entries a list. Sources: core-infonce, core-siglip.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm import ops
from vlm.types import Batch

Listed = tuple[Tensor, Tensor]
"""Indices [r, K], -1 for none, and weights [r, K]."""


def numbers_of(batch: Batch, stream: str | None, sample_index: Tensor) -> Tensor:
    """The number that a stream has of each of these samples, [r]: 0 where it has none; 1 without a stream."""
    if stream is None:
        return torch.ones(len(sample_index))
    rows = batch[stream]
    known = torch.cat([rows.sample_index, sample_index])
    numbers = torch.zeros(int(known.max()) + 1 if len(known) else 0, device=sample_index.device)
    numbers[rows.sample_index[rows.mask]] = rows.values[rows.mask].to(numbers)
    return numbers[sample_index]


def shares_of(batch: Batch, stream: str, sample_index: Tensor, columns: Tensor) -> Tensor:
    """The share of each of the chosen columns, [c]; sample_index [n]: of all rows of the stream of columns.

    Raises ValueError where the stream has not one number a column, in the same order, or a negative one.
    """
    rows = batch[stream]
    if not torch.equal(rows.sample_index, sample_index):
        raise ValueError(f"stream {stream!r} must have one number a column, in the same order")
    shares = torch.where(rows.mask, rows.values, torch.zeros_like(rows.values))[columns]
    if bool((shares < 0).any()):
        raise ValueError(f"stream {stream!r}: a share must not be negative, found {float(shares.min()):g}")
    return shares


def listed_columns(place: Tensor, weight: Tensor, rows: int) -> Listed:
    """place [c], the row that each column belongs to; weight [c] -> of each row its columns and their weights, [rows, K]."""
    slot = place_in_sample(place)
    width = int(slot.max()) + 1 if len(slot) else 0
    index = place.new_full((rows, width), -1)
    weights = weight.new_zeros(rows, width)
    index[place, slot], weights[place, slot] = torch.arange(len(place), device=place.device), weight
    return index, weights


def likely_targets(x: Tensor, y: Tensor, count: int, scale: float, share: float) -> Listed:
    """x [n, D], y [n, D] of a teacher -> share * softmax over the `count` likeliest columns of each row, (1 - share) on the own
    one: [n, count + 1]."""
    index, cosine = ops.likeliest(x, y, count)
    own = torch.arange(len(x), device=x.device)[:, None]
    weights = torch.cat([share * torch.softmax(scale * cosine, 1), torch.full_like(cosine[:, :1], 1 - share)], 1) \
        if index.shape[1] else cosine.new_ones(len(x), 1)
    return torch.cat([index, own], 1), weights


def likely_labels(x: Tensor, y: Tensor, count: int, scale: float, bias: float, share: float) -> Listed:
    """x [n, D], y [n, D] of a teacher -> share * sigmoid of its logit at the `count` likeliest columns of each row."""
    index, cosine = ops.likeliest(x, y, count)
    return index, share * torch.sigmoid(scale * cosine + bias)


def where(sample_index: Tensor) -> Tensor:
    """[greatest sample + 1]: the place of each sample in the list; of others, 0."""
    out = sample_index.new_zeros(int(sample_index.max()) + 1 if len(sample_index) else 0)
    out[sample_index] = torch.arange(len(sample_index), device=sample_index.device)
    return out


def place_in_sample(sample_index: Tensor) -> Tensor:
    """[n]: how many earlier rows are of the same sample."""
    order = torch.argsort(sample_index, stable=True)
    ordered = sample_index[order]
    first = torch.searchsorted(ordered, ordered)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device) - first
    return place
