"""A picture in pieces, in a row of text: its pixels by picture stream, and a placeholder for each piece behind its tag.

Data, generation and a bundle cut by the same `Tiling` and write by the same `with_tiles`. Source: nvlm.
k pieces of a picture, S side of a tower's input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vlm.config.errors import DataError
from vlm.runtime.pieces import TAG, Piece
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.tiling import THUMBNAIL, Tiling


@dataclass(frozen=True, eq=False)
class TiledPicture(Mapping[str, np.ndarray]):
    """One picture: picture stream -> its pieces [k, 3, S, S]; places, tags: (row, column) and text of each piece."""

    streams: Mapping[str, np.ndarray]
    places: tuple[tuple[int, int], ...]
    tags: tuple[str, ...]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.streams[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.streams)

    def __len__(self) -> int:
        return len(self.streams)


def cut_picture(picture: Image.Image, tiling: Tiling, preprocesses: Mapping[str, Preprocess]) -> TiledPicture:
    """An RGB picture as each picture stream wants it, uint8 [k, 3, S, S]; the pieces of all streams correspond."""
    grid = tiling.grid(*picture.size)
    streams = {}
    for name, preprocess in preprocesses.items():
        pieces = tiling.pieces(picture, grid, preprocess.size, preprocess.resampling)
        streams[name] = np.stack([preprocess.to_array(piece.picture) for piece in pieces])
    return TiledPicture(streams, tuple(tiling.places_of(grid)), tuple(tiling.tags_of(grid)))


def row_positions(
    ids: Sequence[int],
    image_id: int | None,
    cost: int,
    places: Sequence[tuple[int, int, int]] = (),
    tags: Collection[int] = (),
    *,
    apart: bool = False,
) -> int:
    """Positions of a row of ids whose placeholders take `cost` each.

    places: (picture, tile row, tile column) of each placeholder; tags: indices of ids that announce the next one. apart:
    tiles and what announces them have no position.
    """
    if not apart:
        return len(ids) + (cost - 1) * sum(token == image_id for token in ids)
    total = waiting = number = 0
    for at, token in enumerate(ids):
        if token == image_id:
            if number >= len(places) or places[number][1:] == THUMBNAIL:
                total += waiting + cost
            waiting, number = 0, number + 1
        elif at in tags:
            waiting += 1
        else:
            total += 1
    return total + waiting


def laid_out(
    pieces: Sequence[Piece], pictures: Sequence[Mapping[str, np.ndarray]], streams: Iterable[str], tiling: Tiling | None
) -> tuple[list[Piece], list[tuple[int, int, int]], dict[str, tuple[np.ndarray, ...]]]:
    """A conversation's pieces and its prepared pictures as a prompt holds them: (the pieces, with a placeholder for each tile;
    (picture, tile row, tile column) of each placeholder, none without tiles; picture stream -> its rows).

    Raises ValueError when a model that reads tiles is given a picture that was not cut.
    """
    if tiling is None:
        return list(pieces), [], {name: tuple(picture[name] for picture in pictures) for name in streams if pictures}
    cut = [picture for picture in pictures if isinstance(picture, TiledPicture)]
    if len(cut) != len(pictures):
        raise ValueError("this model reads tiles: pictures must come from prepare_image")
    places = [(number, *place) for number, picture in enumerate(cut) for place in picture.places]
    rows = {name: tuple(row for picture in cut for row in picture[name]) for name in streams if pictures}
    return with_tiles(pieces, [picture.tags for picture in cut], tiling), places, rows


def with_tiles(pieces: Sequence[Piece], tags: Sequence[Sequence[str]], tiling: Tiling) -> list[Piece]:
    """The pieces of a conversation with a placeholder for each tile, behind its tag, where each picture had one.

    tags: of each picture in order, one text a tile. Tags are text, never special tokens. Raises DataError when the
    placeholders are not as many as the pictures.
    """
    placed = sum(piece.kind == "picture" for piece in pieces)
    if placed != len(tags):
        raise DataError(f"{placed} placeholders, {len(tags)} pictures")
    waiting = iter(tags)
    out: list[Piece] = []
    for piece in pieces:
        if piece.kind != "picture":
            out.append(piece)
            continue
        out.append(Piece("text", tiling.before))
        for tag in next(waiting):
            out += [Piece("text", tag, TAG), piece]
        out.append(Piece("text", tiling.after))
    return [piece for piece in out if piece.text or piece.kind != "text"]
