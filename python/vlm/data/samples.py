"""Samples: what a source yields, why one may be refused, and its identity."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.runtime.pictures import REASONS as PICTURE_REASONS
from vlm.runtime.pictures import Refused

REASONS = {
    **PICTURE_REASONS,
    "bad_name": "an archive member has an absolute, escaping or unprintable name",
    "link": "an archive member is a link",
    "device": "an archive member is a device or another special file",
    "sparse": "an archive member is sparse",
    "duplicate_member": "an archive holds two members of one name",
    "truncated_archive": "the archive ends inside a member",
    "damaged_archive": "an archive header is damaged; what follows in the archive is lost",
    "pickle": "a member is a pickle, which is never read; store JSON, text or safetensors instead",
    "bad_json": "not a JSON object",
    "bad_encoding": "text is not UTF-8",
    "bad_text": "text holds a NUL or half of a surrogate pair",
    "empty_text": "the text is empty",
    "text_too_long": "the text is longer than the limit",
    "missing_image": "the sample has no picture",
    "missing_text": "the sample has no text",
    "missing_field": "the sample lacks a field that the options name",
    "remote": "the picture is a remote address; download it beforehand",
    "bad_messages": "the messages are not of LLaVA's or OpenAI's form",
    "placeholder_mismatch": "the messages name more or fewer pictures than the sample has",
    "too_many_pictures": "the sample has more pictures than the limit",
    "too_long": "prompt and pictures leave no room for an answer",
    "no_corruption": "no rule can make the answer wrong",
    "no_question": "the sample has no question of the kinds asked for",
    "bad_box": "not a box [x0, y0, x1, y1] of shares from 0 to 1",
    "clip": "the picture is a clip, and the model reads single pictures",
    "bad_row": "a row of a table has more or fewer cells than there are columns",
    "bad_number": "not a number of the range that the options name",
    "bad_span": "not a span { text, weight } or { start, end, weight } of the text",
}
"""Stable reasons for refusing a sample, with what they mean."""

REASON_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}
"""A number for each reason (0 is a good sample), which ranks exchange."""
REASON_OF_CODE = {code: reason for reason, code in REASON_CODES.items()}


class BadSample(Refused):
    """A sample that was refused. `reason` is one of `REASONS`."""

    reasons = REASONS


@dataclass(frozen=True)
class Sample:
    """key: `shard:key`. fields: `image` is encoded bytes or a drawn picture; the rest is text and JSON values."""

    key: str
    fields: dict[str, Any]


def stable_id(*parts: str | bytes) -> int:
    """A 63-bit number from names or content; the same on every machine."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8", "backslashreplace") if isinstance(part, str) else part)
        digest.update(b"\x1f")
    return int.from_bytes(digest.digest(), "little") >> 1


def distinct(ids: np.ndarray) -> np.ndarray:
    """[n] int64 ids with the k-th repetition of an id moved to a number of its own."""
    ids = ids.copy()
    for repeat in range(1, len(ids) + 1):
        order = np.argsort(ids, kind="stable")
        again = np.flatnonzero(np.diff(ids[order]) == 0) + 1
        if not len(again):
            return ids
        for index in order[again]:
            ids[index] = stable_id(str(int(ids[index])), str(repeat))
    return ids


def clean_text(text: Any, max_text: int) -> str:
    """The text without surrounding blanks. Raises BadSample when it is no text, empty, too long or has bad characters."""
    if not isinstance(text, str):
        raise BadSample("missing_text", f"a {type(text).__name__} where text was expected")
    if len(text) > max_text:
        raise BadSample("text_too_long", f"{len(text)} > {max_text} characters")
    if "\0" in text:
        raise BadSample("bad_text", "NUL")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadSample("bad_text", "lone surrogate") from None
    text = text.strip()
    if not text:
        raise BadSample("empty_text")
    return text


def group_id(value: Any) -> int:
    """The id of a group: equal for values that differ only in case, width or spacing."""
    text = unicodedata.normalize("NFKC", value if isinstance(value, str) else repr(value))
    return stable_id("group", " ".join(text.casefold().split()))


def field_at(fields: dict[str, Any], path: str) -> Any:
    """The value at a dotted path (`captions.de`), or None."""
    if path in fields:
        return fields[path]
    node: Any = fields
    for part in path.split("."):
        if not isinstance(node, dict) or part not in node:
            return None
        node = node[part]
    return node
