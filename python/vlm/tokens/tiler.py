"""Options of the tiler: a large picture as several pictures of the size that the tower reads. Source: nvlm."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vlm.config.options import Options
from vlm.runtime.tiling import MOST_TILES, Tiling


class TilerOptions(Options):
    """Tiles of a picture are rows of its stream, told apart by `place`; tags are text before each."""

    select: Literal["closest-ratio"] = Field(
        "closest-ratio", description="grid whose columns / rows is nearest the picture's width / height"
    )
    max_tiles: int = Field(6, ge=1, le=MOST_TILES, description="greatest number of tiles, the thumbnail not counted")
    thumbnail: Literal["none", "first", "last"] = Field(
        "last", description="where the whole picture stands; a picture of one tile is its thumbnail alone"
    )
    tags: Literal["none", "text-1d", "text-2d", "text-bbox"] = Field(
        "text-1d", description="text before each tile: its number, its column and row, or its box in pixels"
    )

    before: str = Field("", description='text before the pieces of a picture, inside the template\'s own: "<Image>"')
    after: str = Field("", description='text after them: "</Image>"')

    def build(self, side: int) -> Tiling:
        """The tiling for a tower whose pictures have `side` x `side` pixels."""
        return Tiling(side, self.max_tiles, self.select, self.thumbnail, self.tags, self.before, self.after)
