"""Pictures from untrusted bytes: what is accepted looks right, what is refused says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.runtime.picture_makers import (
    BAD,
    GOOD,
    drawing,
    encode,
    half_transparent,
    noisy,
    palette_with_alpha,
    rotated,
)
from vlm.config.errors import DataError, ExitCode
from vlm.runtime.pictures import REASONS, BadPicture, PictureLimits, as_rgb, decode_picture

LIMITS = PictureLimits(max_bytes=1 << 22, max_pixels=1 << 22)


@pytest.mark.parametrize("name", GOOD)
def test_good_pictures_become_upright_rgb(name):
    picture = decode_picture(GOOD[name](), LIMITS)
    assert (picture.mode, picture.size) == ("RGB", (40, 24))


@pytest.mark.parametrize(
    "name",
    ["jpeg", "jpeg-progressive", "png", "png-16-colour", "gif-animated", "webp-lossless", "bmp", "tiff"],
)
def test_colour_formats_show_the_drawing(name):
    difference = np.abs(
        np.asarray(decode_picture(GOOD[name](), LIMITS)).astype(int) - np.asarray(drawing()).astype(int)
    )
    assert difference.mean() < 12


def test_cmyk_is_close_to_the_drawing():
    got = np.asarray(decode_picture(GOOD["jpeg-cmyk"](), LIMITS)).astype(int)
    assert got[12, 5, 0] > 150 > got[12, 5, 2]
    assert got[12, 35, 2] > 150 > got[12, 35, 0]


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 8])
def test_exif_orientation_is_applied(orientation):
    assert np.array_equal(np.asarray(decode_picture(rotated(orientation), LIMITS)), np.asarray(drawing()))


def test_broken_exif_turns_nothing():
    data = encode(drawing(), "PNG", exif=b"Exif\0\0garbage-that-is-no-tiff")
    assert np.array_equal(np.asarray(decode_picture(data, LIMITS)), np.asarray(drawing()))


def test_transparency_is_composited_on_white():
    source = half_transparent()
    got = np.asarray(decode_picture(encode(source, "PNG"), LIMITS)).astype(float)
    rgba = np.asarray(source).astype(float)
    alpha = rgba[..., 3:] / 255
    assert np.abs(got - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_colour_under_full_transparency_does_not_show():
    source = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (np.asarray(decode_picture(encode(source, "PNG"), LIMITS)) == 255).all()


def test_transparent_palette_entry_is_white():
    got = np.asarray(decode_picture(palette_with_alpha(), LIMITS))
    assert got[5, 5].tolist() == [255, 255, 255]
    assert got[5, 30].tolist() == [0, 0, 255]


def test_sixteen_bit_values_keep_their_high_byte():
    got = np.asarray(decode_picture(GOOD["png-16-grey"](), LIMITS))
    expected = np.linspace(0, 65535, 40 * 24).astype(np.uint16) >> 8
    assert np.array_equal(got[..., 0].ravel(), expected)


def test_animation_gives_its_first_frame():
    got = np.asarray(decode_picture(GOOD["webp-animated"](), LIMITS)).astype(int)
    assert got[12, 5, 0] > 150


@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_refused_with_their_reason(name):
    make, reasons = BAD[name]
    with pytest.raises(BadPicture) as caught:
        decode_picture(make(), PictureLimits(max_bytes=1 << 22, max_pixels=64 << 20))
    assert caught.value.reason in reasons
    assert caught.value.reason in REASONS
    assert caught.value.exit_code == ExitCode.WRONG_DATA
    assert isinstance(caught.value, DataError)


def test_bytes_and_pixels_are_capped():
    data = encode(noisy(), "PNG")
    with pytest.raises(BadPicture, match="too_many_bytes"):
        decode_picture(data, PictureLimits(max_bytes=len(data) - 1))
    with pytest.raises(BadPicture, match="too_many_pixels"):
        decode_picture(data, PictureLimits(max_pixels=64 * 64 - 1))
    assert decode_picture(data, PictureLimits(max_bytes=len(data), max_pixels=64 * 64)).size == (64, 64)


def test_paths_are_named_and_only_regular_files_are_read(tmp_path):
    path = tmp_path / "ü picture.png"
    path.write_bytes(GOOD["png"]())
    assert decode_picture(path, LIMITS).size == (40, 24)
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    for wrong in (fifo, tmp_path, tmp_path / "none.png", Path("/dev/zero")):
        with pytest.raises(BadPicture) as caught:
            decode_picture(wrong, LIMITS)
        assert caught.value.reason == "unreadable"
        assert str(wrong) in str(caught.value)
    big = tmp_path / "big.png"
    with open(big, "wb") as file:
        file.truncate(LIMITS.max_bytes + 1)
    with pytest.raises(BadPicture, match="too_many_bytes"):
        decode_picture(big, LIMITS)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(sorted(GOOD)),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=6),
    st.integers(0, 4000),
)
def test_damaged_bytes_give_a_picture_or_a_bad_picture(name, changes, cut):
    data = bytearray(GOOD[name]())
    for place, value in changes:
        data[place % len(data)] = value
    try:
        picture = decode_picture(bytes(data[: len(data) - cut % 200]), LIMITS)
    except BadPicture as error:
        assert error.reason in REASONS
    else:
        assert picture.mode == "RGB"


_CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from tests.runtime.picture_makers import BAD
from vlm.runtime.pictures import BadPicture, PictureLimits, decode_picture
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for name in [n for n in BAD if n.endswith(("bomb", "thin"))]:
    data = BAD[name][0]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        decode_picture(data, PictureLimits())
    except BadPicture as error:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(name, len(data), error.reason, grown)
"""


def test_bombs_are_refused_from_the_header_within_little_memory():
    out = subprocess.run(
        [sys.executable, "-c", _CHILD, str(Path(__file__).parent)], capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split() for line in out.splitlines()]
    assert {line[0] for line in lines} == {
        "png-bomb",
        "png-thin",
        "webp-bomb",
        "gif-bomb",
        "bmp-bomb",
        "tiff-bomb",
    }
    for _, size, reason, grown in lines:
        assert int(size) < 60_000
        assert reason == "too_many_pixels"
        assert int(grown) < 50 * 1024


def test_a_palette_with_alpha_is_laid_on_white_too():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    palette = clear.quantize()
    assert palette.palette.mode == "RGBA"
    assert as_rgb(palette).getpixel((0, 0)) == as_rgb(clear).getpixel((0, 0)) == (255, 255, 255)
