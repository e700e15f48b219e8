"""Captions as scene graphs, by rules: objects with attributes, and triples (head, relation, tail). Source: structure-clip.

A stand-in for a trained parser: noun phrases are runs of words between function words, as in `corruption`, whose word lists are
used; what stands between two neighbouring phrases of a sentence is their relation. Verbs are told from nouns by their endings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from vlm.data.corruption import ENDS, KIND_OF

DETERMINERS = frozenset("a an the this that these those his her its their my your our some any".split())  # noqa: SIM905
COPULAS = frozenset("is are was were be been being".split())  # noqa: SIM905
_FUNCTION = ENDS | frozenset(
    "next close adjacent far together along alongside opposite against around through across towards onto up down off like besides".split()  # noqa: SIM905
)
_BEFORE_VERB = COPULAS | {"who", "which", "that"}
MEDIA = frozenset("picture photo photograph image drawing painting sketch view scene close-up".split())  # noqa: SIM905
"""What shows objects and is none of them: a picture of a dog."""
_ING_NOUNS = frozenset(
    "ring building painting king string wing thing ceiling clothing wedding railing evening morning awning swing spring sling".split()  # noqa: SIM905
)
_TOKEN = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*|,")
_SENTENCE = re.compile(r"[^.!?;:\n]+")

Triple = tuple[str, str, str]
Token = tuple[str, int, int]
"""A word in lower case (or a comma), and where it starts and stops."""


@dataclass(frozen=True)
class Attribute:
    """One word that says what an object is like, and where it stands."""

    word: str
    start: int
    stop: int


@dataclass(frozen=True)
class Entity:
    """A noun phrase: text[start:stop], its article included. name: its noun, without article and attributes."""

    start: int
    stop: int
    name: str
    attributes: tuple[Attribute, ...]
    sentence: int

    @property
    def meaning(self) -> tuple[str, tuple[str, ...]]:
        """What is said of it: equal for identical objects."""
        return self.name, tuple(sorted(attribute.word for attribute in self.attributes))


@dataclass(frozen=True)
class SceneGraph:
    """entities in the order of the text; relations: (number of the head, words, number of the tail)."""

    text: str
    entities: tuple[Entity, ...]
    relations: tuple[tuple[int, str, int], ...]

    @cached_property
    def triples(self) -> tuple[Triple, ...]:
        """(head, relation, tail): relations first, then each attribute as (object, "is", attribute); none twice."""
        names = [entity.name for entity in self.entities]
        said = [(names[i], relation, names[j]) for i, relation, j in self.relations]
        said += [(entity.name, "is", attribute.word) for entity in self.entities for attribute in entity.attributes]
        return tuple(dict.fromkeys(said))


@lru_cache(maxsize=1 << 15)
def parse(text: str) -> SceneGraph:
    """The scene graph of a caption; of a text without noun phrases, one without entities."""
    entities: list[Entity] = []
    relations: list[tuple[int, str, int]] = []
    for number, sentence in enumerate(_SENTENCE.finditer(text)):
        tokens = [(m.group().lower(), m.start() + sentence.start(), m.end() + sentence.start()) for m in _TOKEN.finditer(sentence.group())]
        found = _entities(tokens, number)
        first = len(entities)
        entities += found
        for k, (one, two) in enumerate(itertools.pairwise(found)):
            relation = _relation([word for word, start, _ in tokens if one.stop <= start < two.start])
            if relation:
                relations.append((first + k, relation, first + k + 1))
    return SceneGraph(text, tuple(entities), tuple(relations))


def _entities(tokens: Sequence[Token], number: int) -> list[Entity]:
    found: list[Entity] = []
    run: list[Token] = []
    article: Token | None = None
    before = ""  # the function word that the run follows
    for token in [*tokens, (",", -1, -1)]:
        word = token[0]
        opens = word in DETERMINERS and word != "that"
        if not opens and word != "," and word not in _FUNCTION:
            run.append(token)
            continue
        _phrases(run, article, before, word, number, found)
        run, article, before = [], (token if opens else None), word
    return found


def _phrases(run: list[Token], article: Token | None, before: str, after: str, number: int, found: list[Entity]) -> None:
    """The noun phrases of a run of words without function words: "brown dog chases" holds one, "dog chases cats" two."""
    described = 0
    while described < len(run) and run[described][0] in KIND_OF:
        described += 1
    attributes = tuple(Attribute(*token) for token in run[:described])
    rest = run[described:]
    if not rest:
        if attributes and before in COPULAS and found:  # the dog is brown
            found[-1] = Entity(found[-1].start, found[-1].stop, found[-1].name, (*found[-1].attributes, *attributes), number)
        return
    verb = _verb([word for word, _, _ in rest], article, before if not attributes else "", after)
    noun = rest if verb is None else rest[:verb]
    if noun and not (noun[-1][0] in MEDIA and after == "of"):
        start = article[1] if article is not None else run[0][1]
        found.append(Entity(start, noun[-1][2], " ".join(word for word, _, _ in noun), attributes, number))
    if verb is not None and verb + 1 < len(rest):
        _phrases(rest[verb + 1 :], None, "", after, number, found)


def _verb(words: Sequence[str], article: Token | None, before: str, after: str) -> int | None:
    """Which word is a verb; a noun comes before it, unless `is` or `who` does."""
    for k in range(0 if before in _BEFORE_VERB and article is None else 1, len(words)):
        word, last = words[k], k + 1 == len(words)
        if len(word) > 4 and word.endswith("ing") and word not in _ING_NOUNS:
            return k
        if len(word) > 3 and word.endswith("ed"):
            return k
        singular = article is not None and article[0] in ("a", "an")
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "'s")) and (singular or not last):
            return k
        if last and after in DETERMINERS:  # between a noun and an article stands a verb
            return k
    return None


def _relation(words: Sequence[str]) -> str:
    """The relation that these words between two phrases say; empty for none: a list, a contrast."""
    if not words or {",", "and", "or", "but"} & set(words):
        return ""
    said = list(words)
    while len(said) > 1 and said[0] in _BEFORE_VERB:
        said = said[1:]
    return " ".join(said)
