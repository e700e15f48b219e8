"""Conversations: messages to pieces of text and pictures, by a template that is data. Source: llava-kd (templates)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from vlm.config.errors import DataError
from vlm.runtime.pieces import ANSWER, CONTEXT, IMAGE, INSTRUCTION, Piece, PieceIds


@dataclass(frozen=True)
class PicturePart:
    """A place in a message where a picture stands; which one is said by the order."""


@dataclass(frozen=True)
class Message:
    """role: `system`, `user` or `assistant`. content: texts and pictures in order."""

    role: str
    content: tuple[str | PicturePart, ...]

    @property
    def text(self) -> str:
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def pictures(self) -> int:
        return sum(isinstance(part, PicturePart) for part in self.content)


@dataclass(frozen=True)
class Turn:
    """What stands around the content of a message. bare: whether the suffix also follows a message without text."""

    prefix: str = ""
    suffix: str = ""
    bare: bool = True


@dataclass(frozen=True)
class Template:
    """How messages are written.

    system, user, assistant: what stands around a message of each role; default_system: the system message where the
    conversation has none. bos: whether the row begins with bos. answer_lead: text between the assistant's prefix and
    the answer, which belongs to the answer (the blank after `ASSISTANT:`). end: what ends an answer, `eos` or a special
    token's text; it is supervised. place: where in the first user message pictures go that no marker places.
    before_picture, after_picture: markup around each placeholder.
    """

    name: str
    system: Turn = Turn()
    user: Turn = Turn()
    assistant: Turn = Turn()
    default_system: str | None = None
    bos: bool = True
    answer_lead: str = ""
    end: str = "eos"
    place: Literal["before", "after"] = "before"
    before_picture: str = ""
    after_picture: str = ""

    def with_pictures(self, messages: Sequence[Message], count: int) -> list[Message]:
        """The messages with `count` pictures at the template's place, where they have no picture of their own.

        Raises DataError when there is no user message to put them in.
        """
        messages = list(messages)
        if not count or any(message.pictures for message in messages):
            return messages
        for i, message in enumerate(messages):
            if message.role == "user":
                parts = (PicturePart(),) * count
                content = (*parts, *message.content) if self.place == "before" else (*message.content, *parts)
                messages[i] = Message("user", content)
                return messages
        raise DataError("the conversation has no user message that could hold its pictures")

    def pieces(self, messages: Sequence[Message], *, answer: bool) -> list[Piece]:
        """The pieces of a conversation.

        answer: with the answers, the last of which ends it; without, it ends where the model goes on (a last
        assistant message is left out). Raises DataError for an unknown role, a picture outside a user message, no
        message at all, or a last message of the wrong role.
        """
        messages = list(messages)
        if not answer and messages and messages[-1].role == "assistant":
            messages.pop()
        wanted = "assistant" if answer else "user"
        if not messages or messages[-1].role != wanted:
            found = messages[-1].role if messages else "nothing"
            raise DataError(f"the conversation ends with {found}, expected a message of {wanted}")
        if self.default_system is not None and messages[0].role != "system":
            messages.insert(0, Message("system", (self.default_system,)))
        out = [Piece("bos")] if self.bos else []
        for message in messages:
            if message.role not in ("system", "user", "assistant"):
                raise DataError(f"role {message.role!r}, expected system, user or assistant")
            if message.pictures and message.role != "user":
                raise DataError(f"a picture in a message of {message.role}: only those of user may hold pictures")
            out += self._assistant(message) if message.role == "assistant" else self._said(message)
        if not answer:
            out.append(Piece("markup", self.assistant.prefix))
        return [piece for piece in out if piece.text or piece.kind not in ("text", "markup")]

    def _said(self, message: Message) -> list[Piece]:
        turn = self.user if message.role == "user" else self.system
        role = INSTRUCTION if message.role == "user" else CONTEXT
        out = [Piece("markup", turn.prefix)]
        for part in message.content:
            if isinstance(part, str):
                out.append(Piece("text", part, role))
            else:
                out += [Piece("markup", self.before_picture), Piece("picture"), Piece("markup", self.after_picture)]
        if turn.bare or message.text:
            out.append(Piece("markup", turn.suffix))
        return out

    def _assistant(self, message: Message) -> list[Piece]:
        said = Piece("text", self.answer_lead + message.text, ANSWER, True)
        return [Piece("markup", self.assistant.prefix), said, self.end_piece, Piece("markup", self.assistant.suffix)]

    @property
    def end_piece(self) -> Piece:
        """What ends an answer."""
        return Piece("eos", "", ANSWER, True) if self.end == "eos" else Piece("markup", self.end, ANSWER, True)

    def end_ids(self, ids_of: PieceIds, eos_id: int | None) -> frozenset[int]:
        """The ids at which an answer ends: eos, and the end of this template where it is one token."""
        end = ids_of.markup(self.end) if self.end != "eos" else []
        return frozenset([*(end if len(end) == 1 else []), *([] if eos_id is None else [eos_id])])

    def to_dict(self) -> dict[str, Any]:
        """As JSON, for `vlm.json` and `bundle.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Template:
        """The inverse of `to_dict`. Raises DataError for a field that is unknown or of another type."""
        fields: dict[str, Any] = {}
        known = {name: field.type for name, field in cls.__dataclass_fields__.items()}
        for name, given in value.items():
            if name not in known:
                raise DataError(f"template has the unknown field {name!r}", remedy=f"known: {', '.join(known)}")
            fields[name] = _turn(name, given) if known[name] == "Turn" else given
        template = cls(**fields) if "name" in fields else cls(name="", **fields)
        texts = (template.name, template.answer_lead, template.end, template.before_picture, template.after_picture)
        right = (
            all(isinstance(text, str) for text in texts)
            and isinstance(template.default_system, str | None)
            and isinstance(template.bos, bool)
            and template.place in ("before", "after")
        )
        if not right or not template.name or not template.end:
            raise DataError("the template has a field of the wrong type", remedy="see vlm.runtime.chat.Template")
        return template


def _turn(name: str, value: Any) -> Turn:
    types = {"prefix": str, "suffix": str, "bare": bool}
    if isinstance(value, Mapping) and all(k in types and isinstance(v, types[k]) for k, v in value.items()):
        return Turn(**value)
    raise DataError(f"template: {name} is {json.dumps(value, default=str)[:80]}, expected prefix, suffix and bare")


def split_markers(text: str) -> tuple[str | PicturePart, ...]:
    """Content of a text in which LLaVA's marker `<image>` stands for a picture; the newline beside it is the
    template's, not the text's, and goes. A text without marker is itself."""
    parts = text.split(IMAGE)
    out: list[str | PicturePart] = []
    for i, part in enumerate(parts):
        part = part.removeprefix("\n") if i else part.lstrip()
        part = part.removesuffix("\n") if i + 1 < len(parts) else part.rstrip()
        out += [PicturePart(), part] if i else [part]
    return tuple(part for part in out if part != "")
