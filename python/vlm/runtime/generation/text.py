"""Tokens to text while they come: never half a character, never a part of a stop text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_BROKEN = "\ufffd"
_LONGEST_PART = 3
"""Bytes of a character whose end is missing, at most: as many tokens, and as many replacement characters, stand for it."""


class Detokenizer:
    """Text in pieces that joined are `decode` of all ids, for decoders of bytes and others that only ever append.

    Text that ends in replacement characters may be half a character, so it is held back until more tokens settle it.
    Only the ids since the last settled point, and the piece before it as context, are decoded again.
    """

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._context = 0  # ids before it only show how what follows is to be read
        self._settled = 0  # ids before it are settled
        self._given = 0  # characters of their text that were handed out

    def push(self, token: int) -> str:
        """The text that is certain with this token."""
        self._ids.append(token)
        text = self._decode(self._ids)
        settled = len(text.rstrip(_BROKEN))
        if len(self._ids) - self._settled > _LONGEST_PART:
            settled = max(settled, len(text) - _LONGEST_PART)
        piece = text[self._given : settled]
        self._given = max(self._given, settled)
        if settled == len(text):
            self._settled = len(self._ids)
            new = self._ids[self._context :]
            # A context without text of its own would hide whether a space stands before the next word.
            if own := self._decode(new):
                self._ids, self._given = new, len(own)
                self._context = self._settled = len(new)
        return piece

    def finish(self) -> str:
        """What is still held back; a character without its end stays a replacement character."""
        text = self._decode(self._ids)
        piece = text[self._given :]
        self._given = len(text)
        return piece

    def fork(self) -> Detokenizer:
        """A copy that goes on alone."""
        other = Detokenizer(self._decode)
        other._ids, other._given = list(self._ids), self._given
        other._context, other._settled = self._context, self._settled
        return other


class StopTexts:
    """Passes text on until one of `stops` is complete; what may become one is held back.

    The one that is complete first counts, of two that end together the longer: where tokens begin does not matter.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text to pass on, whether a stop text was met)."""
        if not self._stops:
            return text, False
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text

    def fork(self) -> StopTexts:
        """A copy that goes on alone."""
        other = StopTexts(self._stops)
        other._held = self._held
        return other


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


class AnswerText:
    """The text of one answer: detokenised as it comes, ended by stop texts."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self._detokenizer = Detokenizer(decode)
        self._stops = StopTexts(stops)

    def push(self, token: int) -> tuple[str, bool]:
        """(new text, whether a stop text was met: then nothing follows)."""
        return self._stops.push(self._detokenizer.push(token))

    def finish(self) -> tuple[str, bool]:
        """(what was held back, whether a stop text was met in it)."""
        text, stopped = self._stops.push(self._detokenizer.finish())
        return (text, True) if stopped else (text + self._stops.finish(), False)

    def fork(self) -> AnswerText:
        """A copy that goes on alone."""
        other = AnswerText.__new__(AnswerText)
        other._detokenizer, other._stops = self._detokenizer.fork(), self._stops.fork()
        return other
