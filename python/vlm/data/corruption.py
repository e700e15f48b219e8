"""Make one thing of a text wrong: an object, a relation or an attribute. Source: povid.

A stand-in for the language model that the paper asks: rules over word lists, and nouns taken from the captions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

COLORS = (
    "red", "green", "blue", "yellow", "purple", "orange", "black", "pink", "white", "brown", "grey", "gray", "golden", "silver",
)  # fmt: skip
SIZES = ("small", "medium", "large", "tiny", "big", "huge")
NUMBERS = ("one", "two", "three", "four", "five", "six")
MATERIALS = ("wooden", "metal", "plastic", "glass", "paper", "leather")
AGES = ("old", "new", "young")
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "arrow")
ATTRIBUTES = (COLORS, SIZES, NUMBERS, MATERIALS, AGES)
"""Words of one kind; a word is replaced by another of its kind."""
SAME = (frozenset({"grey", "gray"}), frozenset({"large", "big", "huge"}), frozenset({"small", "tiny"}))
"""Words of one meaning never replace each other."""
RELATIONS = {
    "left of": "right of", "above": "below", "in front of": "behind", "on top of": "underneath", "inside": "outside",
    "at the top": "at the bottom", "on the left": "on the right", "at the top left": "at the bottom right",
    "at the top right": "at the bottom left", "over": "under", "near": "far from", "on": "under", "with": "without",
    "into": "out of", "in the middle": "in the corner", "facing": "turned away from",
}  # fmt: skip
"""Relations and what is put in their place; each also stands for the way back."""
RULES = ("object", "relation", "attribute")
MAX_NOUNS = 400

_BACK = {wrong: right for right, wrong in RELATIONS.items() if wrong not in RELATIONS}
_OPPOSITE = {**_BACK, "under": "on", **RELATIONS}
_RELATION = re.compile(
    r"\b(?:" + "|".join(sorted(map(re.escape, _OPPOSITE), key=len, reverse=True)) + r")\b", re.IGNORECASE
)
WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
KIND_OF = {word: kind for kind in ATTRIBUTES for word in kind}
"""Word -> the words of its kind."""
ENDS = frozenset(
    "a an the of in on at to from by with without and or but is are was were has have be been being it its this that there "  # noqa: SIM905
    "above below behind under over near left right top bottom middle front into out inside outside beside between "
    "who which whose while as for not no only some any his her their he she they we you i my your our what how many".split()
)
"""Words that are no objects and end a noun phrase."""


@dataclass(frozen=True)
class Corrupted:
    """text: what is said now. rule: what was made wrong. before, after: the words exchanged."""

    text: str
    rule: str
    before: str
    after: str


def nouns_of(texts: Iterable[str]) -> list[str]:
    """Object nouns of captions, the commonest first, at most `MAX_NOUNS`: the last word of each noun phrase.

    A noun phrase is a run of words after an article, or from the start of a sentence, up to a function word or a mark.
    A noun is kept when it ends at least two phrases; adjectives of the word lists and short words are none.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update({word for word, _ in _heads(text)})
    known = [word for word, count in counts.most_common() if count >= 2]
    return known[:MAX_NOUNS]


def _heads(text: str) -> list[tuple[str, int]]:
    """(word in lower case, where it starts) of the last word of each noun phrase."""
    out: list[tuple[str, int]] = []
    for sentence in re.finditer(r"[^.!?;,:\n]+", text):
        words = [(m.group().lower(), m.start() + sentence.start()) for m in WORD.finditer(sentence.group())]
        inside, head = True, None
        for word, start in [*words, ("the", -1)]:
            if word in ENDS:
                if head is not None:
                    out.append(head)
                inside, head = word in ("a", "an", "the") or (inside and head is None), None
            elif inside:
                head = (word, start) if word not in KIND_OF and len(word) > 2 else None
        # A phrase that an unknown word ends has that word as its head; one that ends in an adjective has none.
    return out


def corrupt(text: str, rules: Sequence[str], key: int, nouns: Sequence[str] = ()) -> Corrupted | None:
    """The text with exactly one thing wrong, drawn from `key`; never the text itself.

    rules: the drawn one is tried first, then the others in a drawn order. None where none of them applies.
    """
    generator = np.random.Generator(np.random.Philox(key=key))
    for number in generator.permutation(len(rules)).tolist():
        rule = rules[number]
        if rule == "object":
            places = _objects(text, nouns)
        elif rule == "attribute":
            places = _attributes(text)
        else:
            places = _relations(text)
        if places:
            start, stop, choices = places[int(generator.integers(len(places)))]
            chosen = choices[int(generator.integers(len(choices)))]
            return Corrupted(replaced(text, start, stop, chosen), rule, text[start:stop], chosen)
    return None


Place = tuple[int, int, Sequence[str]]
"""Where a thing stands (start, stop) and what may be put there."""


def _objects(text: str, nouns: Sequence[str]) -> list[Place]:
    """Nouns of the text with the nouns that the text does not hold; shapes are exchanged for shapes."""
    held = {m.group().lower() for m in WORD.finditer(text)}
    known = set(nouns)
    out: list[Place] = []
    for match in WORD.finditer(text):
        word = match.group().lower()
        if word in SHAPES:
            choices = [shape for shape in SHAPES if shape not in held]
        elif word in known:
            choices = [noun for noun in nouns if noun not in held and _unlike(noun, word)]
        else:
            continue
        if choices:
            out.append((match.start(), match.end(), choices))
    return out


def _unlike(one: str, two: str) -> bool:
    """Not the same word in another number: cat and cats."""
    return one.rstrip("s") != two.rstrip("s")


def _attributes(text: str) -> list[Place]:
    held = {m.group().lower() for m in WORD.finditer(text)}
    out: list[Place] = []
    for match in WORD.finditer(text):
        word = match.group().lower()
        kind = KIND_OF.get(word)
        if kind is not None:
            same = next((group for group in SAME if word in group), frozenset({word}))
            choices = [other for other in kind if other not in held and other not in same]
            if choices:
                out.append((match.start(), match.end(), choices))
    return out


def _relations(text: str) -> list[Place]:
    return [(m.start(), m.end(), [_OPPOSITE[m.group().lower()]]) for m in _RELATION.finditer(text)]


def replaced(text: str, start: int, stop: int, new: str) -> str:
    """The text with a part replaced: a capital stays one, an article before it agrees with the new sound."""
    if text[start].isupper():
        new = new[0].upper() + new[1:]
    before = text[:start]
    article = re.search(r"\b([Aa])n?(\s+)$", before)
    if article:
        wanted = article.group(1) + ("n" if new[0].lower() in "aeiou" else "") + article.group(2)
        before = before[: article.start()] + wanted
    return before + new + text[stop:]
