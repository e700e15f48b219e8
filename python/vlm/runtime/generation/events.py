"""What a stream of answers says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlm.runtime.generation.text import AnswerText

FinishReason = Literal["stop", "length"]
"""stop: a token that ends an answer, or a stop text; length: max_new_tokens."""


@dataclass(frozen=True, slots=True)
class Event:
    """One token of one row.

    row: number of the prompt; text: what it adds, often nothing while text is held back; finish_reason: of the last token
    of a row, None before; score: of beam search, with the last token.
    """

    row: int
    token: int
    text: str
    finish_reason: FinishReason | None
    score: float | None = None


def token_event(row: int, text: AnswerText, token: int, eos_ids: frozenset[int], full: bool, score: float | None = None) -> Event:
    """The event of one token, which is read into `text`; full: no other may follow it."""
    if token in eos_ids:
        return Event(row, token, text.finish()[0], "stop", score)
    piece, stopped = text.push(token)
    if stopped:
        return Event(row, token, piece, "stop", score)
    if full:
        rest, stopped = text.finish()
        return Event(row, token, piece + rest, "stop" if stopped else "length", score)
    return Event(row, token, piece, None)
