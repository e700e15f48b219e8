"""Encoded pictures of every kind that the world sends, good and bad, each made from the same drawing."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageDraw


def drawing(width: int = 40, height: int = 24) -> Image.Image:
    """Red left half, blue right half, a green bar along the top: every turn of it looks different."""
    picture = Image.new("RGB", (width, height), (220, 30, 30))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((width // 2, 0, width, height), fill=(30, 30, 220))
    pen.rectangle((0, 0, width, height // 4 - 1), fill=(20, 200, 20))
    return picture


def encode(picture: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def noisy(size: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def sixteen_bit_grey() -> bytes:
    values = (np.linspace(0, 65535, 40 * 24).reshape(24, 40)).astype(np.uint16)
    return encode(Image.fromarray(values), "PNG")


def sixteen_bit_colour() -> bytes:
    """A 16-bit RGB PNG, written by hand: Pillow writes none."""
    values = np.repeat(np.asarray(drawing()).astype(np.uint16)[..., None] * 257, 1, axis=-1)[..., 0].astype(
        ">u2"
    )
    rows = b"".join(b"\0" + values[y].tobytes() for y in range(24))
    return png(40, 24, bits=16, colour=2, data=zlib.compress(rows))


def png(width: int, height: int, *, bits: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def half_transparent() -> Image.Image:
    picture = drawing().convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize(picture.size))
    return picture


def animation(kind: str) -> bytes:
    return encode(
        drawing(), kind, save_all=True, append_images=[Image.new("RGB", (40, 24), "white")], duration=50
    )


def rotated(orientation: int) -> bytes:
    """A lossless picture stored so that EXIF orientation brings it back to the drawing."""
    undo = {
        3: Image.Transpose.ROTATE_180,
        6: Image.Transpose.ROTATE_90,
        8: Image.Transpose.ROTATE_270,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        5: Image.Transpose.TRANSPOSE,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encode(drawing().transpose(undo), "PNG", exif=exif)


def palette_with_alpha() -> bytes:
    picture = Image.new("P", (40, 24), 1)
    picture.putpalette([255, 0, 0, 0, 0, 255, 0, 255, 0])
    picture.paste(0, (0, 0, 20, 24))
    return encode(picture, "PNG", transparency=0)


GOOD = {
    "jpeg": lambda: encode(drawing(), "JPEG", quality=95),
    "jpeg-progressive": lambda: encode(drawing(), "JPEG", progressive=True, quality=95),
    "jpeg-cmyk": lambda: encode(drawing().convert("CMYK"), "JPEG", quality=95),
    "jpeg-grey": lambda: encode(drawing().convert("L"), "JPEG"),
    "png": lambda: encode(drawing(), "PNG"),
    "png-16-grey": sixteen_bit_grey,
    "png-16-colour": sixteen_bit_colour,
    "png-palette-alpha": palette_with_alpha,
    "png-alpha": lambda: encode(half_transparent(), "PNG"),
    "png-grey-alpha": lambda: encode(half_transparent().convert("LA"), "PNG"),
    "png-one-bit": lambda: encode(drawing().convert("1"), "PNG"),
    "png-exif-6": lambda: rotated(6),
    "gif-animated": lambda: animation("GIF"),
    "webp-animated": lambda: animation("WEBP"),
    "webp-lossless": lambda: encode(drawing(), "WEBP", lossless=True),
    "bmp": lambda: encode(drawing(), "BMP"),
    "tiff": lambda: encode(drawing(), "TIFF"),
    "tiff-deflate": lambda: encode(drawing(), "TIFF", compression="tiff_adobe_deflate"),
}

BAD = {
    "empty": (lambda: b"", {"empty"}),
    "html": (lambda: b"<!doctype html><title>404</title>", {"not_a_picture"}),
    "text": (lambda: b"just some words", {"not_a_picture"}),
    "pickle": (lambda: b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix.", {"not_a_picture"}),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", {"not_a_picture"}),
    "eps": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", {"not_a_picture"}),
    "ico": (lambda: encode(drawing(32, 32), "ICO"), {"not_a_picture"}),
    "jpeg-truncated": (lambda: encode(noisy(), "JPEG")[:1500], {"truncated"}),
    "jpeg-header-only": (lambda: encode(drawing(), "JPEG")[:30], {"truncated", "damaged"}),
    "png-truncated": (lambda: encode(noisy(), "PNG")[:3000], {"truncated", "damaged"}),
    "png-flipped": (lambda: encode(noisy(), "PNG").replace(b"IDAT", b"IDAx"), {"damaged", "truncated"}),
    "webp-truncated": (lambda: encode(noisy(), "WEBP")[:700], {"truncated", "damaged"}),
    "gif-truncated": (lambda: encode(drawing(), "GIF")[:40], {"truncated", "damaged"}),
    "tiff-truncated": (lambda: encode(noisy(), "TIFF")[:4000], {"truncated", "damaged"}),
    "tiff-float": (lambda: encode(Image.new("F", (8, 8)), "TIFF"), {"unsupported_mode"}),
    "png-bomb": (lambda: png(30_000, 30_000, data=zlib.compress(bytes(10_000_000), 9)), {"too_many_pixels"}),
    "png-thin": (lambda: png(1_000_000, 1), {"too_many_pixels"}),
    "png-zero": (lambda: png(0, 8), {"bad_size", "damaged"}),
    "webp-bomb": (lambda: webp_header(16_383, 16_383), {"too_many_pixels"}),
    "gif-bomb": (
        lambda: gif_header(65_535, 65_535),
        {"too_many_pixels"},
    ),
    "bmp-bomb": (lambda: bmp_header(60_000, 60_000), {"too_many_pixels"}),
    "tiff-bomb": (lambda: tiff_header(50_000, 50_000), {"too_many_pixels"}),
}
"""name -> (maker, reasons that are right)."""


def webp_header(width: int, height: int) -> bytes:
    """The extended header of a WebP file that states a huge canvas."""
    size = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = (
        b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + size + b"VP8L" + struct.pack("<I", 8) + bytes(8)
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_header(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x01\0\0;"


def bmp_header(width: int, height: int) -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 100, 0, 0, 54) + info + bytes(100)


def tiff_header(width: int, height: int) -> bytes:
    """A little-endian TIFF whose one strip claims to hold everything."""
    entries = [
        (256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1),
        (273, 4, 200), (277, 3, 1), (278, 4, height), (279, 4, 64),
    ]  # fmt: skip
    body = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, k, 1, v) for t, k, v in entries)
    return (b"II*\0" + struct.pack("<I", 8) + body + bytes(4)).ljust(200, b"\0") + zlib.compress(bytes(4000))
