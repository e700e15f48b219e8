"""A large picture as tiles of the size that a model reads, and a thumbnail of the whole. Source: nvlm.

A grid is (columns, rows). Tiles are cut in raster order; a place is (row, column) of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, get_args

from PIL import Image

Select = Literal["closest-ratio"]
Thumbnail = Literal["none", "first", "last"]
TagStyle = Literal["none", "text-1d", "text-2d", "text-bbox"]
Grid = tuple[int, int]

THUMBNAIL = (-1, -1)
"""The place of the thumbnail, as a row and a column that no tile has."""

THUMBNAIL_TAG = "<tile_global_thumbnail>"
MOST_TILES = 64
"""Greatest `max_tiles`: with the side of a tile it bounds the memory that a picture may cost."""

_LARGEST_INTERMEDIATE = 1 << 24
"""Pixels: Pillow resizes across first; where that would leave a larger picture, the height is resized first."""


class Piece(NamedTuple):
    """picture: RGB, side x side pixels. place: (row, column) of a tile, or THUMBNAIL."""

    picture: Image.Image
    place: tuple[int, int]


@cache
def candidates(max_tiles: int) -> tuple[Grid, ...]:
    """Every grid (columns, rows) of at most `max_tiles` tiles, smaller ones first.

    Raises ValueError unless 1 <= max_tiles <= MOST_TILES.
    """
    if not 1 <= max_tiles <= MOST_TILES:
        raise ValueError(f"max_tiles is {max_tiles}, expected 1 to {MOST_TILES}")
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles // c + 1)]
    return tuple(sorted(grids, key=lambda grid: (grid[0] * grid[1], grid[0])))


def choose(width: int, height: int, side: int, max_tiles: int, select: Select = "closest-ratio") -> Grid:
    """The grid for a picture of width x height pixels and tiles of side x side.

    closest-ratio: the least |columns / rows - width / height|, compared exactly. Of grids that are equally near the
    larger wins if the picture has more than half the pixels of the grid; so a small picture is not blown up.
    """
    _positive(side, "side")
    if width < 1 or height < 1:
        raise ValueError(f"the picture is {width} x {height}, expected at least one pixel")
    if select not in get_args(Select):
        raise ValueError(f"select is {select!r}, expected one of {', '.join(get_args(Select))}")
    best, best_gap = (1, 1), abs(width - height)  # of 1 / 1; a gap is |c h - w r| / (r h), compared without the h
    for columns, rows in candidates(max_tiles)[1:]:
        gap = abs(columns * height - width * rows)
        nearer = gap * best[1] - best_gap * rows
        if nearer < 0 or (nearer == 0 and 2 * width * height > side * side * columns * rows):
            best, best_gap = (columns, rows), gap
    return best


def places(grid: Grid, thumbnail: Thumbnail = "last") -> list[tuple[int, int]]:
    """The places of a picture's pieces in order. One tile is the whole picture, so with a thumbnail that alone."""
    if thumbnail not in get_args(Thumbnail):
        raise ValueError(f"thumbnail is {thumbnail!r}, expected one of {', '.join(get_args(Thumbnail))}")
    columns, rows = grid
    cut = [(row, column) for row in range(rows) for column in range(columns)]
    if thumbnail == "none":
        return cut
    if len(cut) == 1:
        return [THUMBNAIL]
    return [THUMBNAIL, *cut] if thumbnail == "first" else [*cut, THUMBNAIL]


def tiles(
    picture: Image.Image,
    side: int,
    max_tiles: int,
    *,
    select: Select = "closest-ratio",
    thumbnail: Thumbnail = "last",
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> list[Piece]:
    """An RGB picture (`decode_picture` gives one) in pieces of side x side pixels.

    It is resized to exactly the grid, its aspect changed and nothing padded, and cut in raster order. The thumbnail
    is the whole picture resized to side x side.
    """
    return cut_grid(picture, choose(*picture.size, side, max_tiles, select), side, thumbnail, resampling)


def cut_grid(
    picture: Image.Image,
    grid: Grid,
    side: int,
    thumbnail: Thumbnail = "last",
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> list[Piece]:
    """An RGB picture in the pieces of a grid that was chosen for it, each of side x side pixels."""
    if picture.mode != "RGB":
        raise ValueError(f"tiles takes RGB pictures, got mode {picture.mode}")
    wanted = places(grid, thumbnail)
    whole = None if wanted == [THUMBNAIL] else resized(picture, (grid[0] * side, grid[1] * side), resampling)
    pieces = []
    for place in wanted:
        if place == THUMBNAIL or whole is None:
            pieces.append(Piece(resized(picture, (side, side), resampling), place))
        else:
            top, left = place[0] * side, place[1] * side
            pieces.append(Piece(whole.crop((left, top, left + side, top + side)), place))
    return pieces


def resized(picture: Image.Image, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    """`picture` with both sides scaled to `size`; memory stays near that of the larger of the two pictures."""
    (width, height), (new_width, new_height) = picture.size, size
    across_first, down_first = new_width * height, width * new_height
    if across_first > _LARGEST_INTERMEDIATE and down_first < across_first:
        picture = picture.resize((width, new_height), resampling)
    return picture.resize(size, resampling)


def tags(grid: Grid, style: TagStyle, thumbnail: Thumbnail = "last", side: int = 1) -> list[str]:
    """One text a piece, in the order of `places`, to stand before the positions of that piece.

    They are plain text for the ordinary tokenizer, not new tokens. text-1d counts tiles from 1: `<tile_3>`. text-2d
    gives column and row from 0: `<tile_x2_y0>`. text-bbox gives left, top, right and bottom in pixels of the resized
    picture, so it needs `side`: `<box> (0, 448), (448, 896) </box>`. The thumbnail is `<tile_global_thumbnail>` in
    each. none: empty texts.
    """
    columns = grid[0]

    def tag(row: int, column: int) -> str:
        if style == "none":
            return ""
        if (row, column) == THUMBNAIL:
            return THUMBNAIL_TAG
        if style == "text-1d":
            return f"<tile_{row * columns + column + 1}>"
        if style == "text-2d":
            return f"<tile_x{column}_y{row}>"
        if style == "text-bbox":
            left, top = column * side, row * side
            return f"<box> ({left}, {top}), ({left + side}, {top + side}) </box>"
        raise ValueError(f"tags is {style!r}, expected one of {', '.join(get_args(TagStyle))}")

    _positive(side, "side")
    return [tag(*place) for place in places(grid, thumbnail)]


def positions(grid: Grid, visual: int, tag: int, thumbnail: Thumbnail = "last") -> int:
    """Positions of a picture in a row: its pieces times (visual positions of one + tokens of one tag)."""
    return len(places(grid, thumbnail)) * (visual + tag)


def _positive(value: int, name: str) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


@dataclass(frozen=True)
class Tiling:
    """How pictures become pieces: the settings above as one value, which a bundle keeps beside its `Preprocess`.

    side: pixels of a tile's side, that of the model's input. before, after: text around all pieces of a picture.
    Raises ValueError on settings that are none.
    """

    side: int
    max_tiles: int = 6
    select: Select = "closest-ratio"
    thumbnail: Thumbnail = "last"
    tags: TagStyle = "text-1d"
    before: str = ""
    after: str = ""

    def __post_init__(self) -> None:
        grid = choose(1, 1, self.side, self.max_tiles, self.select)
        tags(grid, self.tags, "none", self.side)
        places(grid, self.thumbnail)

    def grid(self, width: int, height: int) -> Grid:
        """The grid of a picture of width x height pixels."""
        return choose(width, height, self.side, self.max_tiles, self.select)

    def cut(
        self, picture: Image.Image, resampling: Image.Resampling = Image.Resampling.BICUBIC
    ) -> list[tuple[Piece, str]]:
        """The pieces of an RGB picture, each with its tag."""
        grid = self.grid(*picture.size)
        return list(zip(self.pieces(picture, grid, self.side, resampling), self.tags_of(grid), strict=True))

    def pieces(self, picture: Image.Image, grid: Grid, side: int, resampling: Image.Resampling) -> list[Piece]:
        """The pieces of a picture whose grid is known; side: of the tower that reads them."""
        return cut_grid(picture, grid, side, self.thumbnail, resampling)

    def tags_of(self, grid: Grid) -> list[str]:
        """The tag of each piece, in order; empty texts where pieces have none."""
        return tags(grid, self.tags, self.thumbnail, self.side)

    def places_of(self, grid: Grid) -> list[tuple[int, int]]:
        """The place of each piece, in order."""
        return places(grid, self.thumbnail)
