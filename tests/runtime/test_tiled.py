"""Pictures in pieces in a row of text: pixels of every stream, placeholders behind their tags, positions counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm.config.errors import DataError
from vlm.runtime.chat import Message, PicturePart
from vlm.runtime.generation import Prompt, without_pictures
from vlm.runtime.pieces import ANSWER, CONTEXT, INSTRUCTION, TAG, Piece
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.templates import TEMPLATES
from vlm.runtime.tiled import cut_picture, row_positions, with_tiles
from vlm.runtime.tiling import THUMBNAIL, Tiling
from vlm.types import Role

IMAGE = 9


def quarters(width, height):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0], pixels[height // 2 :, :, 1] = 200, 90
    return Image.fromarray(pixels)


def test_roles_have_the_numbers_of_the_types():
    assert (CONTEXT, INSTRUCTION, ANSWER, TAG) == (Role.CONTEXT, Role.INSTRUCTION, Role.ANSWER, Role.TAG)


def test_the_pieces_of_every_stream_correspond():
    preprocesses = {"image": Preprocess(16, "squash"), "image.fine": Preprocess(32, "squash")}
    tiling = Tiling(16, 6, thumbnail="first")
    cut = cut_picture(quarters(32, 32), tiling, preprocesses)
    assert cut.places == (THUMBNAIL, (0, 0), (0, 1), (1, 0), (1, 1))
    assert cut.tags == ("<tile_global_thumbnail>", "<tile_1>", "<tile_2>", "<tile_3>", "<tile_4>")
    assert {name: array.shape for name, array in cut.items()} == {"image": (5, 3, 16, 16), "image.fine": (5, 3, 32, 32)}
    for array in cut.values():
        assert array.dtype == np.uint8
        assert [tuple(piece[:, piece.shape[1] // 2, piece.shape[2] // 2].tolist()) for piece in array[1:]] == [
            (200, 0, 0), (0, 0, 0), (200, 90, 0), (0, 90, 0),
        ]  # fmt: skip
    # of a picture whose size is that of the grid, the tiles are the pixels themselves
    whole = np.asarray(quarters(32, 32)).transpose(2, 0, 1)
    assert np.array_equal(cut["image"][2], whole[:, :16, 16:])
    assert np.array_equal(cut["image"][3], whole[:, 16:, :16])


def test_nvlm_a_small_picture_is_its_thumbnail_alone():
    cut = cut_picture(quarters(20, 20), Tiling(64), {"image": Preprocess(64, "squash")})
    assert (cut.places, cut.tags, cut["image"].shape) == ((THUMBNAIL,), ("<tile_global_thumbnail>",), (1, 3, 64, 64))
    assert np.array_equal(cut["image"][0], Preprocess(64, "squash").to_array(quarters(20, 20)))


def test_each_placeholder_is_announced_and_the_picture_is_wrapped():
    messages = [Message("user", (PicturePart(), "which?", PicturePart())), Message("assistant", ("one",))]
    pieces = TEMPLATES["vicuna"].pieces(messages, answer=True)
    tiling = Tiling(16, 6, before="<Image>", after="</Image>")
    out = with_tiles(pieces, [("<tile_1>", "<tile_2>"), ("<t>",)], tiling)
    kinds = [(piece.kind, piece.text, piece.role) for piece in out]
    at = kinds.index(("text", "<Image>", CONTEXT))
    picture = ("picture", "", CONTEXT)
    assert kinds[at : at + 6] == [
        ("text", "<Image>", CONTEXT), ("text", "<tile_1>", TAG), picture, ("text", "<tile_2>", TAG), picture,
        ("text", "</Image>", CONTEXT),
    ]  # fmt: skip
    assert kinds[at + 6] == ("markup", "\n", CONTEXT)  # the template's own stays around it
    assert not any(piece.supervised for piece in out if piece.role == TAG)
    plain = with_tiles(pieces, [("", ""), ("",)], Tiling(16, tags="none"))
    assert [p for p in plain if p.kind != "picture"] == [p for p in pieces if p.kind != "picture"]
    assert sum(p.kind == "picture" for p in plain) == 3
    with pytest.raises(DataError, match="2 placeholders, 1 pictures"):
        with_tiles(pieces, [("a",)], tiling)
    assert with_tiles([Piece("text", "hi")], [], tiling) == [Piece("text", "hi")]


PARTS = st.lists(st.tuples(st.sampled_from(["text", "tile", "thumbnail"]), st.integers(0, 4)), max_size=8)


@given(parts=PARTS, cost=st.integers(1, 9))
def test_positions_are_counted_as_by_hand(parts, cost):
    ids, tags, places, beside = [], set(), [], 0
    for kind, count in parts:
        if kind == "text":
            ids += [1] * count
            beside += count
            continue
        tags |= set(range(len(ids), len(ids) + count))
        ids += [2] * count + [IMAGE]
        places.append((0, 0, 0) if kind == "tile" else (0, *THUMBNAIL))
        beside += 0 if kind == "tile" else count + cost
    assert row_positions(ids, IMAGE, cost, places, tags, apart=True) == beside
    assert row_positions(ids, IMAGE, cost, places, tags) == len(ids) + len(places) * (cost - 1)


def test_a_prompt_without_pictures_has_no_tags_either():
    prompt = Prompt((5, 6, IMAGE, 6, IMAGE, 7), {"image": ()}, tags=frozenset({1, 3}))
    assert without_pictures(prompt, IMAGE).ids == (5, 7)
    assert without_pictures(Prompt((5, 6, IMAGE, 7)), IMAGE).ids == (5, 6, 7)
