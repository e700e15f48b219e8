"""The tokeniser of every text metric: lower-case words of letters and digits.

A word is a run of letters, digits and their combining marks, in compatibility form and lower case; everything else
separates. Scripts that are written without spaces between words (Han, kana, Thai, Lao, Khmer, Myanmar) are split
into characters, each with its marks. Korean is written with spaces: its words stay whole.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

Ngram = tuple[str, ...]

_SPACELESS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # iteration and closing marks, zero
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),
)
_JOINERS = "\u200c\u200d"  # they shape letters inside a word


def _spaceless(character: str) -> bool:
    code = ord(character)
    return any(low <= code <= high for low, high in _SPACELESS)


def words(text: str) -> list[str]:
    """The words of a text: "A dog's Ball, 2 m." -> a, dog, s, ball, 2, m; "赤い車" -> 赤, い, 車."""
    if text.isascii():
        return "".join(c if c.isalnum() else " " for c in text.lower()).split()
    out: list[str] = []
    inside = False  # whether the last entry may grow
    for character in unicodedata.normalize("NFKC", text).lower():
        kind = unicodedata.category(character)[0]
        if kind == "M":  # a mark belongs to the letter before it
            if out and inside:
                out[-1] += character
        elif character in _JOINERS:
            continue
        elif kind not in "LN":
            inside = False
        elif _spaceless(character):
            out.append(character)
            inside = True
        elif inside and not _spaceless(out[-1][0]):
            out[-1] += character
        else:
            out.append(character)
            inside = True
    return out


def ngrams(tokens: Sequence[str], most: int = 4) -> Counter[Ngram]:
    """How often each run of 1 to `most` tokens occurs."""
    return Counter(
        tuple(tokens[start : start + size])
        for size in range(1, most + 1)
        for start in range(len(tokens) - size + 1)
    )
