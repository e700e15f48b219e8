"""Captions made wrong by an exchange within their scene graph: the two objects of a relation, or an attribute of two objects.

Every exchange is an involution, and the caption itself is never made. Source: structure-clip.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from vlm.data.corruption import KIND_OF, NUMBERS, SAME, Corrupted, replaced
from vlm.data.scene_graph import SceneGraph, parse

SwapMode = Literal["relation", "attribute"]
SYMMETRIC = (
    "next to", "beside", "besides", "near", "close to", "adjacent to", "with", "alongside", "touching", "facing", "opposite", "far from",
    "against", "kissing", "hugging", "meeting", "like", "from",
)  # fmt: skip
"""Relations that hold both ways, alone or at the end of more words; exchanged, they would stay true."""
_SYMMETRIC_ALONE = ("of", "by", "is", "are", "was", "were")

Exchange = tuple[str, int, int, int, int]
"""Mode, entity, its attribute (-1 for the whole phrase), the other entity, its attribute."""


def is_symmetric(relation: str) -> bool:
    """Whether a relation says the same when its two objects change places."""
    return relation in _SYMMETRIC_ALONE or any(relation == known or relation.endswith(f" {known}") for known in SYMMETRIC)


@lru_cache(maxsize=1 << 15)
def swaps(text: str, modes: tuple[SwapMode, ...] = ("relation", "attribute")) -> tuple[Corrupted, ...]:
    """Every wrong caption that one exchange makes of a caption, in the order of the text; the same exchange leads back.

    Left out are relations that hold both ways, objects of which the same is said, attributes of one meaning, and whatever would read
    differently afterwards, so that the way back were another.
    """
    graph = parse(text)
    out: dict[str, Corrupted] = {}
    for exchange in _exchanges(graph):
        if exchange[0] not in modes:
            continue
        new = _exchanged(graph, exchange)
        again = parse(new)
        if new.lower() != text.lower() and exchange in _exchanges(again) and _exchanged(again, exchange) == text:
            (a, b), (c, d) = _places(graph, exchange)
            out.setdefault(new, Corrupted(new, exchange[0], text[a:b], text[c:d]))
    return tuple(out.values())


def swapped(text: str, modes: Sequence[SwapMode], key: int) -> Corrupted | None:
    """One of `swaps`, drawn from `key`: the mode first, among those that the caption allows. None where none applies."""
    found = swaps(text, tuple(modes))
    if not found:
        return None
    generator = np.random.Generator(np.random.Philox(key=key))
    rules = sorted({one.rule for one in found})
    rule = rules[int(generator.integers(len(rules)))]
    own = [one for one in found if one.rule == rule]
    return own[int(generator.integers(len(own)))]


def _exchanges(graph: SceneGraph) -> list[Exchange]:
    out: list[Exchange] = []
    entities = graph.entities
    for i, relation, j in graph.relations:
        if not is_symmetric(relation) and entities[i].meaning != entities[j].meaning:
            out.append(("relation", i, -1, j, -1))
    said = Counter(entity.meaning for entity in entities)
    for j, two in enumerate(entities):
        for i, one in enumerate(entities[:j]):
            for p, first in enumerate(one.attributes):
                for q, second in enumerate(two.attributes):
                    if not _exchangeable(first.word, second.word):
                        continue
                    changed = said - Counter([one.meaning, two.meaning])
                    for entity, at, word in ((one, p, second.word), (two, q, first.word)):
                        words = [a.word for a in entity.attributes]
                        words[at] = word
                        changed[entity.name, tuple(sorted(words))] += 1
                    if changed != said:
                        out.append(("attribute", i, p, j, q))
    return out


def _exchangeable(one: str, two: str) -> bool:
    """Of one kind and not of one meaning. Numbers stay: with them the noun would have to change."""
    kind = KIND_OF[one]
    return one != two and kind is KIND_OF[two] and kind is not NUMBERS and not any({one, two} <= same for same in SAME)


def _places(graph: SceneGraph, exchange: Exchange) -> tuple[tuple[int, int], tuple[int, int]]:
    """From, to of the two parts of the text, the first one first."""
    _, i, p, j, q = exchange
    parts = [graph.entities[n] if at < 0 else graph.entities[n].attributes[at] for n, at in ((i, p), (j, q))]
    (a, b), (c, d) = sorted((part.start, part.stop) for part in parts)
    return (a, b), (c, d)


def _exchanged(graph: SceneGraph, exchange: Exchange) -> str:
    """The text with the two parts exchanged: phrases move with their articles, before attributes the article follows the sound; a place
    that began with a capital still does."""
    text = graph.text
    (a, b), (c, d) = _places(graph, exchange)
    first, second = _cased(text[c:d], text[a]), _cased(text[a:b], text[c])
    if exchange[0] == "attribute":
        return replaced(replaced(text, c, d, second), a, b, first)
    return text[:a] + first + text[b:c] + second + text[d:]


def _cased(part: str, like: str) -> str:
    """The part with its first letter as large as the letter `like`."""
    return (part[0].upper() if like.isupper() else part[0].lower()) + part[1:]
