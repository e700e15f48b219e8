"""Pieces of a row: what a template makes of messages, and their token ids.

A piece is tokenised alone, so which tokens are supervised never depends on how texts merge, and the pieces of
training and of generation agree up to the answer. Only the template makes special tokens: text of a user that spells
one stays text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from vlm.config.errors import DataError

CONTEXT, INSTRUCTION, ANSWER, TAG = 0, 1, 2, 4
"""Roles of a piece, numbered as `vlm.types.Role`; TAG: text that announces the tile of the next placeholder."""
IMAGE = "<image>"
"""How a picture is written in LLaVA's data and in rendered text."""

PieceKind = Literal["text", "markup", "picture", "bos", "eos"]


@dataclass(frozen=True)
class Piece:
    """A part of a row. kind: `text` of a message (never a special token), `markup` of the template (may be one),
    `picture` (the placeholder), `bos`, `eos`; the last three have no text. role: CONTEXT, INSTRUCTION, ANSWER or TAG."""

    kind: PieceKind
    text: str = ""
    role: int = CONTEXT
    supervised: bool = False


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
        return [i for _, encoding in self._parts(text) for i in encoding.ids]

    def located(self, text: str) -> list[tuple[int, int, int]]:
        """The same with the characters of the text that each id stands for: (id, from, to)."""
        return [
            (i, at + start, at + stop) for at, encoding in self._parts(text) for i, (start, stop) in zip(encoding.ids, encoding.offsets)
        ]

    def _parts(self, text: str) -> Iterator[tuple[int, Encoding]]:
        """(where it begins, ids) of the parts that hold no forbidden token, in order."""
        led = self._led(text)
        waiting = [(led, len(text) - len(led))]
        while waiting:
            part, at = waiting.pop()
            encoding = self._core.encode(part, add_special_tokens=False)
            cuts = self._cuts(part, encoding)
            if cuts is None:
                yield at, encoding
            else:
                waiting += reversed([(part[a:b], at + a) for a, b in cuts if a < b])

    def markup(self, text: str) -> list[int]:
        """The ids of the template's own text, special tokens included."""
        return list(self._core.encode(self._led(text), add_special_tokens=False).ids)

    def _led(self, text: str) -> str:
        return text[1:] if self._leads and len(text) > 1 and text[0] == " " else text

    def _cuts(self, text: str, encoding: Encoding) -> list[tuple[int, int]] | None:
        """The parts of the text, from and to, cut inside each forbidden token; None when there is none."""
        if self._forbidden.isdisjoint(encoding.ids):
            return None
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
                raise ValueError("ids_of makes special tokens of a message's text; use vlm.runtime.pieces.PieceIds")
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
