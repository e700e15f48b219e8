"""The known word that a wrong one is nearest to, as messages say it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(word: object, known: Iterable[str], lead: str = "; did you mean", end: str = "") -> str:
    """`; did you mean 'x'?` for the end of a message; '' where no known word is near, and for what is no word.

    end: what follows every known word as a user writes it (`:` of a prefix).
    """
    near = get_close_matches(word, list(known), n=1) if isinstance(word, str) else []
    return f"{lead} {near[0] + end!r}?" if near else ""
