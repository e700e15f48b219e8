"""Messages of a sample, in LLaVA's form (`from`, `value`) or OpenAI's (`role`, `content`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlm.data.samples import BadSample, clean_text, field_at
from vlm.runtime.chat import Message, PicturePart, split_markers

AUTO_MESSAGES = ("conversations", "messages")
_LLAVA_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MAX_MESSAGES = 1000
MAX_PICTURES = 64
"""Pictures of a sample at most."""


def messages_of(fields: dict[str, Any], column: str, max_text: int) -> tuple[list[Message], list[Any], list[Mapping[str, Any]]]:
    """(messages up to the last answer, addresses of pictures that the messages themselves hold, the entry of each answer).

    LLaVA: `<image>` in what a human says is a picture. OpenAI: parts of type `image` or `image_url` are; text that
    spells the marker is text. Raises BadSample.
    """
    names = AUTO_MESSAGES if column == "auto" else (column,)
    value = next((v for name in names if (v := field_at(fields, name)) is not None), None)
    if value is None:
        raise BadSample("missing_text", "field " + " or ".join(names))
    if not isinstance(value, list) or not value:
        raise BadSample("bad_messages", f"a {type(value).__name__} where a list of messages was expected")
    if len(value) > _MAX_MESSAGES:
        raise BadSample("bad_messages", f"{len(value)} messages, expected at most {_MAX_MESSAGES}")
    messages: list[Message] = []
    addresses: list[Any] = []
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise BadSample("bad_messages", f"message {number} is a {type(entry).__name__}")
        if "from" in entry:
            messages.append(_llava(entry, number, max_text))
        elif "role" in entry:
            messages.append(_openai(entry, number, max_text, addresses))
        else:
            raise BadSample("bad_messages", f"message {number} has neither from nor role")
    while messages and messages[-1].role != "assistant":
        messages.pop()  # a question that nobody answered
    if not messages:
        raise BadSample("bad_messages", "no answer of the assistant")
    held = sum(message.pictures for message in messages)
    if addresses and len(addresses) < held:
        raise BadSample("placeholder_mismatch", f"{held} pictures, {len(addresses)} with an address")
    answers = [entry for entry, message in zip(value, messages) if message.role == "assistant"]
    return messages, addresses[:held], answers


def _llava(entry: dict[str, Any], number: int, max_text: int) -> Message:
    role = _LLAVA_ROLES.get(entry["from"]) if isinstance(entry["from"], str) else None
    if role is None:
        raise BadSample("bad_messages", f"message {number} is from {str(entry['from'])[:40]!r}, expected human, gpt or system")
    text = entry.get("value")
    if not isinstance(text, str):
        raise BadSample("bad_messages", f"value of message {number} is a {type(text).__name__}")
    if role != "user":
        return Message(role, (clean_text(text, max_text),))
    return Message(role, split_markers(clean_text(text, max_text)))


def _openai(entry: dict[str, Any], number: int, max_text: int, addresses: list[Any]) -> Message:
    role, content = entry["role"], entry.get("content")
    if role not in ("system", "user", "assistant"):
        raise BadSample("bad_messages", f"message {number} has the role {str(role)[:40]!r}")
    if isinstance(content, str):
        return Message(role, (clean_text(content, max_text),))
    if not isinstance(content, list):
        raise BadSample("bad_messages", f"content of message {number} is a {type(content).__name__}")
    parts: list[str | PicturePart] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text", "output_text") and isinstance(part.get("text"), str):
            if part["text"]:
                parts.append(_checked(part["text"], max_text))
        elif kind in ("image", "image_url", "input_image"):
            address = part.get("image_url", part.get("image", part.get("url", part.get("path"))))
            if isinstance(address, dict):
                address = address.get("url")
            if address is not None:
                addresses.append(address)
            parts.append(PicturePart())
        else:
            raise BadSample("bad_messages", f"message {number} has a part of type {str(kind)[:40]!r}")
    if role == "assistant" and not any(isinstance(part, str) and part.strip() for part in parts):
        raise BadSample("empty_text", f"answer of message {number}")
    return Message(role, tuple(parts))


def _checked(text: str, max_text: int) -> str:
    """The text as it is, blanks included, if it is a good one or blank."""
    if text.strip():
        clean_text(text, max_text)
    elif len(text) > max_text:
        raise BadSample("text_too_long", f"{len(text)} > {max_text} characters")
    return text


def pictures_in(value: Any) -> list[Any]:
    """The pictures that a field holds: none, one, or a list. Raises BadSample when there are too many."""
    if value is None or value == "":
        return []
    found = list(value) if isinstance(value, list) else [value]
    if len(found) > MAX_PICTURES:
        raise BadSample("too_many_pictures", f"{len(found)}, expected at most {MAX_PICTURES}")
    return found
