"""Decode untrusted pictures: one way for training, evaluation, embedding and serving.

Size in bytes is bounded before reading, the format by its first bytes, the number of pixels by the header, and
only then are pixels decoded. What comes out is always an upright 8-bit RGB picture without transparency.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from vlm.config.errors import DataError

REASONS = {
    "empty": "the file is empty",
    "unreadable": "the file cannot be read",
    "too_many_bytes": "the file is larger than the byte limit",
    "not_a_picture": "not a picture of an accepted format (PNG, JPEG, WebP, GIF, BMP, TIFF)",
    "too_many_pixels": "the header states more pixels than the limit",
    "bad_size": "the header states a width or height of zero",
    "truncated": "the file ends before the picture does",
    "damaged": "the file is damaged",
    "unsupported_mode": "the kind of pixels cannot be turned into RGB",
}
"""Stable reasons for refusing a picture, with what they mean."""


class Refused(DataError):
    """Something untrusted that was refused for a stable `reason`, a key of the class's `reasons`."""

    reasons: ClassVar[Mapping[str, str]]

    def __init__(self, reason: str, detail: str = "", *, where: str | None = None) -> None:
        self.reason = reason
        self.detail = detail
        text = self.reasons[reason]
        super().__init__(f"{reason}: {text} ({detail})" if detail else f"{reason}: {text}", where=where)


class BadPicture(Refused):
    """A picture that was refused. `reason` is one of `REASONS`."""

    reasons = REASONS


@dataclass(frozen=True)
class PictureLimits:
    """What a picture may cost: bytes of the encoded file, pixels (width times height) of the decoded one.

    max_side bounds the strips that resizing an extreme aspect ratio needs.
    """

    max_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 64 * 1024 * 1024
    max_side: int = 65_535


DEFAULT_LIMITS = PictureLimits()


def decode_picture(
    source: bytes | bytearray | memoryview | str | os.PathLike[str], limits: PictureLimits = DEFAULT_LIMITS
) -> Image.Image:
    """An upright RGB picture from encoded bytes or a path to a regular file.

    EXIF rotation is applied, palettes are resolved, transparency is composited on white, CMYK is converted, 16-bit
    values are scaled to 8 bits (their high byte), and an animation gives its first frame.
    Raises BadPicture; its `reason` says which rule was broken.
    """
    where = None
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
    else:
        where = os.fspath(source)
        data = read_file(where, limits.max_bytes)
    try:
        return _decode(data, limits)
    except BadPicture as error:
        raise BadPicture(error.reason, error.detail, where=where) from error.__cause__


def read_file(path: str, max_bytes: int) -> bytes:
    """At most `max_bytes` of a regular file; pipes and devices are refused before they can block."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise BadPicture("unreadable", getattr(error, "strerror", None) or str(error), where=path) from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise BadPicture("unreadable", "not a regular file", where=path)
        if status.st_size > max_bytes:
            raise BadPicture("too_many_bytes", f"{status.st_size} > {max_bytes}", where=path)
        with open(handle, "rb", closefd=False) as file:
            return file.read(max_bytes + 1)
    except OSError as error:
        raise BadPicture("unreadable", error.strerror or "", where=path) from error
    finally:
        os.close(handle)


def _decode(data: bytes, limits: PictureLimits) -> Image.Image:
    if not data:
        raise BadPicture("empty")
    if len(data) > limits.max_bytes:
        raise BadPicture("too_many_bytes", f"{len(data)} > {limits.max_bytes}")
    opener = _format_of(data)
    if opener is None:
        raise BadPicture("not_a_picture", f"first bytes {data[:8].hex(' ')}")
    if opener is WebPImagePlugin.WebPImageFile:
        # Its decoder takes memory for the whole canvas as soon as it is made, so the size is read here first.
        _check_size(*_webp_size(data), limits)
    try:
        # The format class, not Image.open: the first bytes chose it, and no other format may have a try.
        picture = opener(io.BytesIO(data))
        _check_size(*picture.size, limits)
        picture.load()
        return _to_rgb(_upright(picture))
    except (BadPicture, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadPicture("too_many_pixels", str(error)) from error
    except Warning as error:  # under an error filter for warnings
        reason = "too_many_pixels" if isinstance(error, Image.DecompressionBombWarning) else "damaged"
        raise BadPicture(reason, str(error)) from error
    except Exception as error:
        # Format classes raise many types (OSError, SyntaxError, ValueError, struct.error, ...) on damaged files.
        text = str(error)
        cut = isinstance(error, EOFError) or any(
            w in text.lower() for w in ("truncated", "unexpected end", "eof")
        )
        raise BadPicture(
            "truncated" if cut else "damaged", (text or type(error).__name__)[:200]
        ) from error


def _format_of(data: bytes) -> Callable[[io.BytesIO], ImageFile.ImageFile] | None:
    """The one format class that the first bytes name, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return JpegImagePlugin.JpegImageFile
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PngImagePlugin.PngImageFile
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return WebPImagePlugin.WebPImageFile
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return GifImagePlugin.GifImageFile
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return TiffImagePlugin.TiffImageFile
    if data[:2] == b"BM":
        return BmpImagePlugin.BmpImageFile
    return None


def _check_size(width: int, height: int, limits: PictureLimits) -> None:
    if width < 1 or height < 1:
        raise BadPicture("bad_size", f"{width} x {height}")
    if width * height > limits.max_pixels or max(width, height) > limits.max_side:
        limit = f"{limits.max_pixels} pixels, {limits.max_side} a side"
        raise BadPicture("too_many_pixels", f"{width} x {height}, limit {limit}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height that the first chunk of a WebP file states."""
    chunk = data[12:16]
    if len(data) < 30:
        raise BadPicture("truncated", "WebP header")
    if chunk == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if chunk == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", data[26:30])
        return width & 0x3FFF, height & 0x3FFF
    raise BadPicture("damaged", "WebP without a picture chunk")


def _upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF orientation asks; unreadable EXIF data turn nothing."""
    if not any(
        name in picture.info for name in ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
    ):
        return picture
    try:
        turned = ImageOps.exif_transpose(picture)
    except Exception:
        return picture
    return turned if turned is not None else picture


def _to_rgb(picture: Image.Image) -> Image.Image:
    mode = picture.mode
    if mode == "RGB" and "transparency" not in picture.info:
        # A plain Image, so that no file object or metadata travels with it.
        return picture if type(picture) is Image.Image else picture.copy()
    if mode.startswith("I;16") or mode == "I":
        return _from_sixteen_bits(picture)
    if mode == "P":
        alpha = "transparency" in picture.info or (picture.palette is not None and picture.palette.mode.endswith("A"))
        picture = picture.convert("RGBA" if alpha else "RGB")
    elif mode in ("RGB", "L", "1") and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif mode in ("LA", "PA", "La", "RGBa"):
        picture = picture.convert("LA").convert("RGBA") if mode == "La" else picture.convert("RGBA")
    elif mode not in ("RGB", "RGBA", "L", "1", "CMYK", "YCbCr", "RGBX", "HSV"):
        raise BadPicture("unsupported_mode", mode)
    if picture.mode == "RGBA":
        return _on_white(picture)
    return picture.convert("RGB") if picture.mode != "RGB" else picture


def _on_white(picture: Image.Image) -> Image.Image:
    """RGBA over opaque white: (colour * alpha + 255 * (255 - alpha)) / 255, rounded."""
    white = Image.new("RGB", picture.size, (255, 255, 255))
    white.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
    return white


def _from_sixteen_bits(picture: Image.Image) -> Image.Image:
    """Grey pictures of more than 8 bits: the high byte, as Pillow takes it for 16-bit colour."""
    transparent = picture.info.get("transparency")
    values = np.asarray(picture).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 0xFFFF):
        raise BadPicture("unsupported_mode", "32-bit grey")
    grey = (values >> 8).astype(np.uint8)
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def as_rgb(picture: bytes | str | os.PathLike[str] | Image.Image, limits: PictureLimits = DEFAULT_LIMITS) -> Image.Image:
    """An upright RGB picture from bytes, a path or a Pillow picture; transparency is laid on white. Raises BadPicture."""
    if isinstance(picture, Image.Image):
        return _to_rgb(_upright(picture))
    return decode_picture(picture, limits)
