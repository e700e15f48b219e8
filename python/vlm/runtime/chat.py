"""Conversations: messages to pieces of text and pictures, by a template that is data.

A piece is tokenised alone, so which tokens are supervised never depends on how texts merge, and the pieces of
training and of generation agree up to the answer. Only the template makes special tokens: text of a user that spells
one stays text. Source: llava-kd (templates).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from vlm.config.errors import DataError

CONTEXT, INSTRUCTION, ANSWER, TAG = 0, 1, 2, 4
"""Roles of a piece, numbered as `vlm.types.Role`; TAG: text that announces the tile of the next placeholder."""
IMAGE = "<image>"
"""How a picture is written in LLaVA's data and in rendered text."""

PieceKind = Literal["text", "markup", "picture", "bos", "eos"]


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
class Piece:
    """A part of a row. kind: `text` of a message (never a special token), `markup` of the template (may be one),
    `picture` (the placeholder), `bos`, `eos`; the last three have no text. role: CONTEXT, INSTRUCTION, ANSWER or TAG."""

    kind: PieceKind
    text: str = ""
    role: int = CONTEXT
    supervised: bool = False


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

    def jinja(self) -> str:
        """The same template as `chat_template.jinja` of transformers: `messages` with texts or content parts."""
        values = {
            "BOS": "{{- bos_token -}}" if self.bos else "",
            "TEXT": _quoted(self.default_system or ""),
            "LEAD": _quoted(self.answer_lead),
            "END": "eos_token" if self.end == "eos" else _quoted(self.end),
            "PICTURE": _quoted(self.before_picture + IMAGE + self.after_picture),
        }
        for name in ("system", "user", "assistant"):
            turn: Turn = getattr(self, name)
            values[f"{name.upper()}_PREFIX"] = _quoted(turn.prefix)
            values[f"{name.upper()}_SUFFIX"] = _quoted(turn.suffix)
            values[f"{name.upper()}_BARE"] = str(turn.bare).lower()
        text = _JINJA.replace("@DEFAULT@", "" if self.default_system is None else _JINJA_SYSTEM)
        return re.sub("@([A-Z_]+)@", lambda found: values[found.group(1)], text)


_JINJA_SYSTEM = """{%- if not messages or messages[0].role != "system" -%}
{{- @SYSTEM_PREFIX@ -}}{{- @TEXT@ -}}{{- @SYSTEM_SUFFIX@ -}}
{%- endif -%}
"""
_JINJA = """{#- Pieces of text and pictures; content is text, or a list of parts of type text or image. -#}
{%- macro content(message) -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == "text" -%}{{- part.text -}}{%- else -%}{{- @PICTURE@ -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- macro words(message) -%}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}{%- for part in message.content if part.type == "text" -%}{{- part.text -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
@BOS@
@DEFAULT@
{%- for message in messages -%}
{%- if message.role == "user" -%}
{{- @USER_PREFIX@ -}}{{- content(message) -}}
{%- if @USER_BARE@ or words(message) -%}{{- @USER_SUFFIX@ -}}{%- endif -%}
{%- elif message.role == "system" -%}
{{- @SYSTEM_PREFIX@ -}}{{- content(message) -}}
{%- if @SYSTEM_BARE@ or words(message) -%}{{- @SYSTEM_SUFFIX@ -}}{%- endif -%}
{%- else -%}
{{- @ASSISTANT_PREFIX@ -}}{{- @LEAD@ -}}{{- words(message) -}}{{- @END@ -}}{{- @ASSISTANT_SUFFIX@ -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- @ASSISTANT_PREFIX@ -}}{%- endif -%}
"""


def _quoted(text: str) -> str:
    """A string of the template language; it knows the escapes of Python."""
    return '"' + text.encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'


def _turn(name: str, value: Any) -> Turn:
    types = {"prefix": str, "suffix": str, "bare": bool}
    if isinstance(value, Mapping) and all(k in types and isinstance(v, types[k]) for k, v in value.items()):
        return Turn(**value)
    raise DataError(f"template: {name} is {json.dumps(value, default=str)[:80]}, expected prefix, suffix and bare")


def _headed(role: str) -> Turn:
    return Turn(f"<|start_header_id|>{role}<|end_header_id|>\n\n", "<|eot_id|>" if role != "assistant" else "")


def _marked(role: str) -> Turn:
    return Turn(f"<|im_start|>{role}\n", "<|im_end|>\n" if role != "assistant" else "\n")


TEMPLATES: dict[str, Template] = {
    "plain": Template("plain", system=Turn(suffix="\n"), user=Turn(suffix="\n", bare=False)),
    "vicuna": Template(
        "vicuna",
        system=Turn(suffix=" "),
        user=Turn("USER: ", " "),
        assistant=Turn("ASSISTANT:"),
        default_system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        answer_lead=" ",
        after_picture="\n",
    ),
    "llama3": Template(
        "llama3",
        system=_headed("system"),
        user=_headed("user"),
        assistant=_headed("assistant"),
        end="<|eot_id|>",
        after_picture="\n",
    ),
    "chatml": Template(
        "chatml",
        system=_marked("system"),
        user=_marked("user"),
        assistant=_marked("assistant"),
        default_system="You are a helpful assistant.",
        bos=False,
        end="<|im_end|>",
        after_picture="\n",
    ),
}
"""plain: pictures, text, a newline if there is text, answer, eos: tiny and caption models. vicuna: LLaVA-1.5.
llama3: Llama 3. chatml: Qwen."""


def template_named(name: str) -> Template:
    """Raises DataError that names the known templates."""
    if name not in TEMPLATES:
        raise DataError(f"unknown template {name!r}", remedy=f"known: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


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


def render(pieces: Sequence[Piece], *, bos: str = "", eos: str = "", image: str = IMAGE) -> str:
    """The pieces as one text, special tokens spelled out: what a reader sees, and what `jinja` renders."""
    spelled = {"bos": bos, "eos": eos, "picture": image}
    return "".join(spelled.get(piece.kind, piece.text) for piece in pieces)


class Encoding(Protocol):
    @property
    def ids(self) -> list[int]: ...
    @property
    def offsets(self) -> list[tuple[int, int]]: ...


class Core(Protocol):
    """What is used of a `tokenizers.Tokenizer`."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> Any: ...
    def get_added_tokens_decoder(self) -> dict[int, Any]: ...


class PieceIds:
    """Texts to ids without bos and eos, over a `tokenizers.Tokenizer`.

    The library finds added tokens inside any text. Called on the text of a message, this cuts such a text inside each
    special token that came out and encodes the parts apart, until none is left; other text has the usual ids.
    `markup` leaves them in. A tokenizer that puts a blank before every text gets it without a blank of its own.
    """

    def __init__(self, core: Core, special: Sequence[int] = ()) -> None:
        """special: further ids that text may never become (the placeholder, where it is no special token)."""
        self._core = core
        added = core.get_added_tokens_decoder()
        self._contents = {i: token.content for i, token in added.items() if token.special or i in special}
        self._forbidden = frozenset(self._contents) | frozenset(special)
        unknown = getattr(getattr(core, "model", None), "unk_token", None)
        self._unknown = {i for i, content in self._contents.items() if content == unknown or content == "<unk>"}
        probe = core.encode("a", add_special_tokens=False)
        self._leads = bool(getattr(probe, "tokens", None)) and probe.tokens[0].startswith("▁")

    def __call__(self, text: str) -> list[int]:
        """The ids of a message's text, none of them special (but unknown, where a character is).

        One character that is a special token by itself cannot be cut and is left out.
        """
        return [i for i, _, _ in self.located(text)]

    def located(self, text: str) -> list[tuple[int, int, int]]:
        """The same with the characters of the text that each id stands for: (id, from, to)."""
        led = self._led(text)
        out: list[tuple[int, int, int]] = []
        waiting = [(led, len(text) - len(led))]
        while waiting:
            part, at = waiting.pop()
            encoding = self._core.encode(part, add_special_tokens=False)
            cuts = self._cuts(part, encoding)
            if cuts is None:
                out += [(i, at + start, at + stop) for i, (start, stop) in zip(encoding.ids, encoding.offsets)]
            else:
                waiting += reversed([(part[a:b], at + a) for a, b in cuts if a < b])
        return out

    def markup(self, text: str) -> list[int]:
        """The ids of the template's own text, special tokens included."""
        return list(self._core.encode(self._led(text), add_special_tokens=False).ids)

    def _led(self, text: str) -> str:
        return text[1:] if self._leads and len(text) > 1 and text[0] == " " else text

    def _cuts(self, text: str, encoding: Encoding) -> list[tuple[int, int]] | None:
        """The parts of the text, from and to, cut inside each forbidden token; None when there is none."""
        ends: list[tuple[int, int]] = []  # (where a part ends, where the next begins)
        for i, (start, stop) in zip(encoding.ids, encoding.offsets):
            if i not in self._forbidden:
                continue
            span = text[start:stop]
            if i in self._unknown and span.strip() != self._contents.get(i):
                continue  # the model has no token for it
            inner = start + len(span) - len(span.lstrip()) + 1
            ends.append((inner, inner) if len(span.strip()) > 1 else (start, stop))
        if not ends:
            return None
        stops = [end for end, _ in ends] + [len(text)]
        starts = [0] + [begin for _, begin in ends]
        return list(zip(starts, stops))


def encode_pieces(
    pieces: Sequence[Piece],
    ids_of: PieceIds | Callable[[str], list[int]],
    image_id: int | None,
    bos_id: int | None,
    eos_id: int | None,
) -> tuple[list[int], list[int], list[bool]]:
    """(ids, role, supervised) of a row, each piece tokenised alone; image_id stands for picture pieces only.

    ids_of: a `PieceIds`. Without bos_id the row has no bos. Raises DataError where a picture or the end of an answer
    has no token, and ValueError when ids_of makes one of the three ids out of a message's text.
    """
    ids: list[int] = []
    roles: list[int] = []
    supervised: list[bool] = []
    markup = getattr(ids_of, "markup", ids_of)
    for piece in pieces:
        if piece.kind == "text":
            own = list(ids_of(piece.text))
            if image_id in own or bos_id in own or eos_id in own:
                raise ValueError("ids_of makes special tokens of a message's text; use vlm.runtime.chat.PieceIds")
        elif piece.kind == "markup":
            own = list(markup(piece.text))
        elif piece.kind == "picture":
            if image_id is None:
                raise DataError("the tokenizer has no token that stands for a picture", remedy="add the special token image")
            own = [image_id]
        elif piece.kind == "bos":
            own = [] if bos_id is None else [bos_id]
        else:
            if eos_id is None:
                raise DataError("the tokenizer has no eos, which ends an answer", remedy="choose a template with an end of its own")
            own = [eos_id]
        ids += own
        roles += [piece.role] * len(own)
        supervised += [piece.supervised] * len(own)
    return ids, roles, supervised
