"""From the items of a request to texts and picture bytes. Nothing is ever fetched: pictures come as data URIs."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Literal

from vlm.serving.errors import ApiError
from vlm.serving.settings import ServerSettings

MIMES = ("image/png", "image/jpeg", "image/jpg", "image/webp", "image/gif", "image/bmp", "image/tiff", "application/octet-stream")


@dataclass(frozen=True)
class Item:
    """One thing to embed. `param` is its place in the request."""

    kind: Literal["text", "image"]
    value: str | bytes
    param: str


def text_item(text: str, settings: ServerSettings, param: str) -> Item:
    """Raises ApiError 400 for an empty, overlong or not encodable text."""
    if not text:
        raise ApiError(400, f"{param}: the text is empty", code="empty_text", param=param)
    if len(text) > settings.max_characters:
        raise ApiError(400, f"{param}: {len(text)} characters, at most {settings.max_characters}", code="text_too_long", param=param)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, f"{param}: not valid Unicode (a lone surrogate)", code="bad_text", param=param) from None
    return Item("text", text, param)


def image_item(url: str, settings: ServerSettings, param: str) -> Item:
    """The bytes of a data URI. Raises ApiError: 400 for any other URL, 413 when too large, 415 for another media type."""
    head, comma, payload = url.partition(",")
    if head[:5].lower() != "data:":
        scheme = url.partition(":")[0].lower()
        named = f"{scheme}: " if scheme in ("http", "https", "file", "ftp", "gopher") and ":" in url else ""
        raise ApiError(
            400,
            f"{param}: {named}this server fetches nothing and reads no files; send the picture as data:image/png;base64,...",
            code="remote_fetch_refused",
            param=param,
        )
    mime, *options = head[5:].split(";")
    if not comma or [o.strip().lower() for o in options][-1:] != ["base64"]:
        raise ApiError(400, f"{param}: expected data:MIME;base64,DATA", code="bad_data_uri", param=param)
    if mime.strip().lower() not in MIMES:
        said = f"{param}: media type {mime[:60]!r} is not accepted; accepted: {', '.join(MIMES[:-1])}"
        raise ApiError(415, said, code="media_type", param=param)
    # Four characters carry three bytes: the size is known before anything is decoded.
    if len(payload) // 4 * 3 > settings.max_picture_bytes + 3:
        said = f"{param}: the picture is larger than {settings.max_picture_bytes} bytes"
        raise ApiError(413, said, code="picture_too_large", param=param)
    try:
        data = base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, f"{param}: not valid base64", code="bad_base64", param=param) from None
    return Item("image", data, param)


def check_count(count: int, settings: ServerSettings, param: str = "input") -> None:
    """Raises ApiError 400 when a request holds no item or more than allowed."""
    if count == 0:
        raise ApiError(400, f"{param}: nothing to embed", code="empty_input", param=param)
    if count > settings.max_items:
        raise ApiError(400, f"{param}: {count} items, at most {settings.max_items} a request", code="too_many_items", param=param)
