"""The tiler: the exact checks of nvlm, a brute force over grids, pixels, tags, bounds."""

from __future__ import annotations

import resource
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vlm.runtime import tiling
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.tiling import (
    MOST_TILES,
    THUMBNAIL,
    Tiling,
    candidates,
    choose,
    places,
    positions,
    resized,
    tags,
    tiles,
)

SIDES = st.integers(1, 4000)


def numbered(columns: int, rows: int, side: int) -> Image.Image:
    """A picture of columns x rows squares of side x side, each of its own colour."""
    cells = np.arange(rows * columns, dtype=np.uint8).reshape(rows, columns) * 7
    pixels = np.kron(cells, np.ones((side, side), np.uint8))
    return Image.fromarray(np.stack([pixels, 255 - pixels, pixels], axis=-1))


def test_nvlm_the_fourteen_grids_of_six_tiles():
    words = "1:1 1:2 1:3 1:4 1:5 1:6 2:1 2:2 2:3 3:1 3:2 4:1 5:1 6:1"
    assert sorted(candidates(6)) == [tuple(int(n) for n in word.split(":")) for word in words.split()]


@pytest.mark.parametrize("most", [1, 2, 5, 12, MOST_TILES])
def test_candidates_are_all_grids_once(most):
    grids = candidates(most)
    assert len(set(grids)) == len(grids)
    assert set(grids) == {(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if c * r <= most}
    assert [c * r for c, r in grids] == sorted(c * r for c, r in grids)


def brute_force(width: int, height: int, side: int, most: int) -> set[tuple[int, int]]:
    """Grids at the least distance, and of those the largest that the picture fills by more than half."""
    gaps = {grid: abs(Fraction(*grid) - Fraction(width, height)) for grid in candidates(most)}
    nearest = [grid for grid, gap in gaps.items() if gap == min(gaps.values())]
    filled = [grid for grid in nearest if width * height > Fraction(side * side * grid[0] * grid[1], 2)]
    if not filled:
        least = min(c * r for c, r in nearest)
        return {grid for grid in nearest if grid[0] * grid[1] == least}
    greatest = max(c * r for c, r in filled)
    return {grid for grid in filled if grid[0] * grid[1] == greatest}


@given(SIDES, SIDES, st.integers(1, 700), st.integers(1, 16))
@settings(max_examples=200, deadline=None)
def test_nvlm_the_nearest_ratio_is_chosen(width, height, side, most):
    assert choose(width, height, side, most) in brute_force(width, height, side, most)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 60), st.integers(1, 60), st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_nvlm_ties_are_decided_as_in_the_brute_force(columns, rows, scale, side, most):
    """Pictures whose ratio is that of a grid, or halfway between two: where ties arise."""
    assert choose(columns * scale, rows * scale, side, most) in brute_force(columns * scale, rows * scale, side, most)
    width, height = (2 * columns * rows + columns) * scale, 2 * rows * scale
    assert choose(width, height, side, most) in brute_force(width, height, side, most)


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((448, 448), (1, 1)),
        ((896, 896), (2, 2)),
        ((633, 633), (1, 1)),  # 400689 pixels are fewer than half of 4 x 448^2 = 802816
        ((634, 634), (2, 2)),  # 401956 are more than half, 401408
        ((128, 64), (2, 1)),
        ((1344, 896), (3, 2)),
        ((1000, 1001), (2, 2)),
        ((500, 600), (1, 1)),  # 5:6 is as far from 2:3 as from 1:1, and 300000 pixels are fewer than 3 x 448^2
        ((1000, 1200), (2, 3)),  # the same ratio, and 1200000 pixels are more than 602112
        ((1, 10_000), (1, 6)),
        ((10_000, 1), (6, 1)),
    ],
)
def test_nvlm_choices(size, grid):
    assert choose(*size, 448, 6) == grid


def test_nvlm_tiles_are_cut_in_raster_order_with_the_thumbnail_last():
    picture = numbered(3, 2, 16)
    pieces = tiles(picture, 16, 6)
    assert [piece.place for piece in pieces] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), THUMBNAIL]
    for piece in pieces[:-1]:
        row, column = piece.place
        expected = picture.crop((column * 16, row * 16, column * 16 + 16, row * 16 + 16))
        assert piece.picture.tobytes() == expected.tobytes()
    assert pieces[-1].picture.tobytes() == picture.resize((16, 16), Image.Resampling.BICUBIC).tobytes()
    first = tiles(picture, 16, 6, thumbnail="first")
    assert [piece.place for piece in first] == [THUMBNAIL, *[piece.place for piece in pieces[:-1]]]
    assert [piece.place for piece in tiles(picture, 16, 6, thumbnail="none")] == [p.place for p in pieces[:-1]]


@pytest.mark.parametrize("thumbnail", ["first", "last"])
def test_nvlm_one_tile_yields_only_the_thumbnail(thumbnail):
    (piece,) = tiles(numbered(1, 1, 9), 16, 6, thumbnail=thumbnail)
    assert piece.place == THUMBNAIL
    assert piece.picture.size == (16, 16)
    assert tags((1, 1), "text-1d", thumbnail) == ["<tile_global_thumbnail>"]
    (piece,) = tiles(numbered(1, 1, 9), 16, 6, thumbnail="none")
    assert piece.place == (0, 0)
    assert tags((1, 1), "text-1d", "none") == ["<tile_1>"]


@given(SIDES.filter(lambda n: n < 300), SIDES.filter(lambda n: n < 300), st.integers(1, 33), st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_pieces_put_together_are_the_resized_picture(width, height, side, most):
    seed = np.random.default_rng(width * 1000 + height)
    picture = Image.fromarray(seed.integers(0, 256, (height, width, 3), np.uint8))
    columns, rows = choose(width, height, side, most)
    pieces = tiles(picture, side, most, thumbnail="none")
    whole = Image.new("RGB", (columns * side, rows * side))
    for piece in pieces:
        assert piece.picture.size == (side, side)
        whole.paste(piece.picture, (piece.place[1] * side, piece.place[0] * side))
    assert whole.tobytes() == picture.resize(whole.size, Image.Resampling.BICUBIC).tobytes()


def test_a_piece_passes_preprocessing_unchanged():
    for piece in tiles(numbered(3, 1, 40), 32, 6):
        pixels = Preprocess(32).to_array(piece.picture)
        assert np.array_equal(pixels, np.asarray(piece.picture).transpose(2, 0, 1))


def test_nvlm_tags():
    assert tags((2, 2), "text-1d") == ["<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>", "<tile_global_thumbnail>"]
    assert tags((2, 1), "text-2d", "first") == ["<tile_global_thumbnail>", "<tile_x0_y0>", "<tile_x1_y0>"]
    assert tags((1, 2), "text-2d", "none") == ["<tile_x0_y0>", "<tile_x0_y1>"]
    assert tags((1, 2), "text-bbox", "none", 448) == ["<box> (0, 0), (448, 448) </box>", "<box> (0, 448), (448, 896) </box>"]
    assert tags((1, 2), "none") == ["", "", ""]


@pytest.mark.parametrize("style", ["text-1d", "text-2d", "text-bbox"])
@pytest.mark.parametrize("thumbnail", ["none", "first", "last"])
def test_every_piece_has_a_tag_of_its_own(style, thumbnail):
    for grid in candidates(12):
        found = tags(grid, style, thumbnail, 32)
        assert len(found) == len(set(found)) == len(places(grid, thumbnail))


def test_nvlm_positions_of_a_picture():
    assert [positions(grid, 256, 5) for grid in ((1, 1), (2, 1), (3, 2))] == [261, 3 * 261, 7 * 261]
    assert positions((3, 2), 256, 0, "none") == 6 * 256
    assert positions((1, 1), 256, 5, "none") == 261


def test_a_tiling_says_the_same_in_one_value():
    plan = Tiling(16, max_tiles=6, thumbnail="first", tags="text-2d")
    cut = plan.cut(numbered(3, 2, 16))
    assert [tag for _, tag in cut] == tags(plan.grid(48, 32), "text-2d", "first")
    assert [piece.place for piece, _ in cut] == places((3, 2), "first")


@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (65_535, 2), (2, 65_535), (1, 1)])
def test_an_extreme_ratio_costs_little_memory(size):
    picture = Image.new("RGB", size, (10, 200, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = tiles(picture, 448, 6)
    assert len(pieces) == (1 if size == (1, 1) else 7)
    for piece in pieces:
        assert piece.picture.size == (448, 448)
        assert (np.asarray(piece.picture) == (10, 200, 30)).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_resizing_the_height_first_is_within_one_of_pillow(monkeypatch):
    picture = Image.linear_gradient("L").resize((9, 250)).convert("RGB")
    expected = np.asarray(picture.resize((64, 32), Image.Resampling.BICUBIC)).astype(int)
    monkeypatch.setattr(tiling, "_LARGEST_INTERMEDIATE", 1)
    sizes = []
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, r, old=Image.Image.resize: sizes.append(size) or old(self, size, r))
    assert np.abs(np.asarray(resized(picture, (64, 32), Image.Resampling.BICUBIC)).astype(int) - expected).max() <= 1
    assert sizes == [(9, 32), (64, 32)]


@pytest.mark.parametrize(
    ("act", "named"),
    [
        (lambda: candidates(0), "max_tiles is 0"),
        (lambda: candidates(MOST_TILES + 1), "max_tiles is 65"),
        (lambda: choose(0, 4, 16, 6), "0 x 4"),
        (lambda: choose(4, 4, 0, 6), "side is 0"),
        (lambda: choose(4, 4, 16, 6, "nearest"), "select is 'nearest'"),
        (lambda: places((1, 1), "middle"), "thumbnail is 'middle'"),
        (lambda: tags((1, 1), "emoji", "none"), "tags is 'emoji'"),
        (lambda: tiles(Image.new("L", (4, 4)), 16, 6), "mode L"),
        (lambda: Tiling(0), "side is 0"),
        (lambda: Tiling(16, max_tiles=0), "max_tiles is 0"),
        (lambda: Tiling(16, tags="emoji"), "tags is 'emoji'"),
        (lambda: Tiling(16, thumbnail="middle"), "thumbnail is 'middle'"),
    ],
)
def test_settings_that_are_none_are_refused(act, named):
    with pytest.raises(ValueError, match=named):
        act()
