"""What a prompt lays into its row and what beside it, for cross blocks to read.

S positions of a row, M visual tokens beside it, C width, K visual tokens of a picture. Source: nvlm (forms X and H), flamingo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vlm.runtime.tiling import THUMBNAIL


class Asked(Protocol):
    """What is read of a prompt."""

    @property
    def ids(self) -> Sequence[int]: ...
    @property
    def places(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def tags(self) -> frozenset[int]: ...


@dataclass(frozen=True)
class Laid:
    """One row.

    x [S, C]; owner [S], number of the picture that a position came from, -1 for text; tokens [M, C] beside it; sees [S, M] int64, 1
    where a position sees a token.
    """

    x: np.ndarray
    owner: np.ndarray
    tokens: np.ndarray
    sees: np.ndarray


def expanded(embedded: np.ndarray, placed: np.ndarray, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """embedded [T, C] with the pictures [k, K, C] in place of the placeholders `placed` [T] -> (x [S, C], owner [S])."""
    width = np.where(placed, visual.shape[1], 1)
    owner = np.repeat(np.where(placed, np.cumsum(placed) - 1, -1), width)
    x = np.repeat(embedded, width, axis=0)
    x[owner >= 0] = visual.reshape(-1, visual.shape[2])
    return x, owner


def laid_beside(prompt: Asked, embedded: np.ndarray, placed: np.ndarray, visual: np.ndarray) -> Laid:
    """All pictures beside the row (form X): a position sees those at or before it; a tag sees the tile that it announces and nothing
    else."""
    K = visual.shape[1]
    places = np.flatnonzero(placed).tolist()
    sees = np.zeros((len(embedded), len(places) * K), np.int64)
    for number, at in enumerate(places):
        sees[at:, number * K : (number + 1) * K] = 1
    for at in prompt.tags:
        tile = next((number for number, place in enumerate(places) if place > at), None)
        if tile is not None:
            sees[at] = 0
            sees[at, tile * K : (tile + 1) * K] = 1
    return Laid(embedded, np.full(len(embedded), -1, np.int64), visual.reshape(-1, visual.shape[2]), sees)


def laid_apart(prompt: Asked, embedded: np.ndarray, placed: np.ndarray, visual: np.ndarray) -> Laid:
    """Tiles beside the row, each behind the embeddings of its tag; whole pictures and thumbnails in the row (form H). A position sees the
    tiles that stood before it."""
    apart = np.zeros(len(embedded), bool)
    waiting: list[int] = []
    number = 0
    for at in range(len(embedded)):
        if placed[at]:
            apart[at] = number < len(prompt.places) and tuple(prompt.places[number][1:]) != THUMBNAIL
            apart[waiting] = apart[at]
            waiting, number = [], number + 1
        elif at in prompt.tags:
            waiting.append(at)
    tiles = apart[placed]
    x, owner = expanded(embedded[~apart], placed[~apart], visual[~tiles])
    owner[owner >= 0] = np.flatnonzero(~tiles)[owner[owner >= 0]]
    tokens, _ = expanded(embedded[apart], placed[apart], visual[tiles])
    width = np.where(placed, visual.shape[1], 1)
    here = np.where(apart, 0, width)
    before = (np.cumsum(here) - here)[apart]  # positions of the row before each tag and tile
    anchor = np.repeat(before, width[apart])
    return Laid(x, owner, tokens, (anchor[None, :] <= np.arange(len(x))[:, None]).astype(np.int64))
