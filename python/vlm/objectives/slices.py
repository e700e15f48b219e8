"""Slices of an interleaved row: each picture, and each text between pictures. n rows, T positions, K slices, C width. Source: sugar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from vlm.config.errors import RunFailed
from vlm.types import Layout, Outputs
from vlm.types.layout import IGNORE, Modality


@dataclass(frozen=True)
class Slices:
    """The slices of n rows in order.

    read [n, K, T] float32: how a slice is read from hidden states, the mean over the positions of a picture or the last supervised
    position of a text; mask [n, K]; visual [n, K] bool; source [n, K]: row of the picture stream, or how many texts of the row
    came before.
    """

    read: Tensor
    mask: Tensor
    visual: Tensor
    source: Tensor


def slices_of(layout: Layout) -> Slices:
    """A run of text without a supervised position (a prompt, the first token) is no slice."""
    rows = [_slices_of_row(*columns) for columns in zip(*(t.tolist() for t in _columns(layout)))]
    n, longest = layout.mask.shape[0], max((len(row) for row in rows), default=0)
    read = torch.zeros(n, longest, layout.mask.shape[1])
    visual = torch.zeros(n, longest, dtype=torch.bool)
    source = torch.full((n, longest), -1)
    for i, row in enumerate(rows):
        texts = 0
        for k, (picture, positions) in enumerate(row):
            read[i, k, positions] = 1 / len(positions)
            visual[i, k], source[i, k] = picture >= 0, picture if picture >= 0 else texts
            texts += picture < 0
    device = layout.mask.device
    return Slices(read.to(device), (source >= 0).to(device), visual.to(device), source.to(device))


def _columns(layout: Layout) -> tuple[Tensor, ...]:
    visual = layout.modality == Modality.IMAGE
    return layout.mask, torch.where(visual, layout.picture, -1), visual, layout.label != IGNORE


def _slices_of_row(
    mask: Sequence[bool], picture: Sequence[int], visual: Sequence[bool], supervised: Sequence[bool]
) -> list[tuple[int, list[int]]]:
    """(row of the picture stream or -1, positions that are read) of each slice."""
    live = [t for t, valid in enumerate(mask) if valid]
    found = []
    for (seen, number), run in groupby(live, key=lambda t: (visual[t], picture[t])):
        positions = list(run)
        if not seen:
            positions = [t for t in positions if supervised[t]][-1:]
        if positions:
            found.append((number if seen else -1, positions))
    return found


def embedded(
    slices: Slices, rows: Tensor, pictures: Outputs | None, texts: Outputs | None, keys: Sequence[str], name: str
) -> Tensor:
    """What a companion says of each slice, [n, K, E]: of a picture its row, of a text the row with its number among those of the
    sample; 0 for the kind that it does not embed. rows [n]: the sample of each row.

    Raises RunFailed, which names the sample, where there are not as many rows of text as slices of text.
    """
    some = pictures if pictures is not None else texts
    assert some is not None
    assert some.embedding is not None
    out = some.embedding.new_zeros(*slices.mask.shape, some.embedding.shape[1])
    if pictures is not None:
        assert pictures.embedding is not None
        wanted = slices.mask & slices.visual
        out[wanted] = pictures.embedding[slices.source[wanted]]
    if texts is None:
        return out
    assert texts.embedding is not None
    for row, sample in enumerate(rows.tolist()):
        wanted = slices.mask[row] & ~slices.visual[row]
        own = texts.embedding[(texts.sample_index == sample) & texts.mask]
        if len(own) != int(wanted.sum()):
            raise RunFailed(
                f"{name} has {len(own)} texts where the row has {int(wanted.sum())} slices of text",
                where=keys[sample],
                remedy="the stream of texts must hold each text between pictures, in order",
            )
        out[row, wanted] = own
    return out
