"""Write about a scene: captions in several phrasings, a description in sentences, questions with balanced answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vlm.data.scenes.layout import COLORS, OPPOSITE, SHAPES, Scene, Thing

NUMBERS = ("no", "one", "two", "three", "four")
_PLACES = (
    "at the top left", "at the top", "at the top right", "on the left", "in the middle",
    "on the right", "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip


def a(words: str) -> str:
    """The words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sized(thing: Thing) -> str:
    return f"{thing.size} {thing.name}"


def listing(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def captions(scene: Scene) -> list[str]:
    """Several true captions; each names the main object."""
    things = scene.things
    main = things[0]
    out = [
        listing([a(thing.name) for thing in things]),
        f"a picture of {listing([a(sized(thing)) for thing in things])}",
        f"{a(sized(main))} {_PLACES[main.cell]}",
    ]
    related = [(name, things[j]) for i, name, j in scene.relations if i == 0]
    if related:
        name, other = related[-1]
        out.append(f"{a(main.name)} {name} {a(other.name)}")
        name, other = related[0]
        out.append(f"there is {a(sized(main))} {name} {a(sized(other))}")
    if len(things) > 1:
        word = NUMBERS[len(things)]
        out.append(f"{word} shapes: {listing([thing.name for thing in things])}")
    else:
        out.append(f"there is only {a(main.name)}")
    return out


def description(scene: Scene) -> str:
    """One sentence for each object, then one for each pair in one direction."""
    sentences = [f"{a(sized(t))} is {_PLACES[t.cell]}." for t in scene.things]
    things = scene.things
    sentences += [
        f"the {things[i].name} is {name} the {things[j].name}." for i, name, j in scene.relations if i < j
    ]
    return " ".join(map(_capital, sentences))


def sentence(thing: Thing) -> str:
    """One object with size, color, shape and place as a whole sentence."""
    return f"{_capital(a(sized(thing)))} is {_PLACES[thing.cell]}."


def long_caption(scene: Scene) -> str:
    """One sentence for each object, in their order, then one for each two neighbours in it: how the first stands to the second."""
    things = scene.things
    said = [sentence(thing) for thing in things]
    for i, j in pairwise(range(len(things))):
        name = next(name for first, name, second in scene.relations if (first, second) == (i, j))
        said.append(f"The {things[i].name} is {name} the {things[j].name}.")
    return " ".join(said)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def placed(thing: Thing) -> str:
    """One object with size, color, shape and place."""
    return f"{a(sized(thing))} {_PLACES[thing.cell]}"


def inventory(scene: Scene) -> str:
    """Every object once, with size, color, shape and place, in reading order of the places."""
    return listing([placed(thing) for thing in sorted(scene.things, key=lambda thing: thing.cell)])


def attributes(scene: Scene, only: Thing | None = None) -> list[dict[str, Any]]:
    """What there is to ask about each object alone, or about one: its shape by its color, its color by its shape, its size
    by both, and what is at its place. Only what one object answers is asked."""
    things = scene.things
    shapes, colors, names, cells = zip(*((t.shape, t.color, t.name, t.cell) for t in things), strict=True)
    out: list[dict[str, Any]] = []
    for thing in sorted(things if only is None else [only], key=lambda thing: thing.cell):
        if colors.count(thing.color) == 1:
            out.append({"kind": "shape", "question": f"what shape is the {thing.color} object?", "answer": thing.shape})
        if shapes.count(thing.shape) == 1:
            out.append({"kind": "color", "question": f"what color is the {thing.shape}?", "answer": thing.color})
        if names.count(thing.name) == 1:
            out.append({"kind": "size", "question": f"how large is the {thing.name}?", "answer": thing.size})
        if cells.count(thing.cell) == 1:
            out.append({"kind": "place", "question": f"what is {_PLACES[thing.cell]}?", "answer": a(thing.name)})
    return out


def dialogue(scene: Scene, asked: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a model that answers is trained on: the questions, those about the main object alone, and what is there at all."""
    known = {entry["question"] for entry in asked}
    own = [entry for entry in attributes(scene, scene.things[0]) if entry["question"] not in known]
    return [*asked, *own, {"kind": "inventory", "question": "what is in the picture?", "answer": inventory(scene)}]


def questions(scene: Scene, draws: Sequence[float], yes: float = 0.5) -> list[dict[str, Any]]:
    """Questions of five kinds. draws: at least 8 numbers in [0, 1). yes: how likely the answer of a yes-no question is yes."""
    things = scene.things
    out: list[dict[str, Any]] = []

    def ask(kind: str, question: str, answer: str) -> None:
        out.append({"kind": kind, "question": question, "answer": answer})

    ask("count", "how many objects are there?", NUMBERS[len(things)])
    shapes = [t.shape for t in things]
    colors = [t.color for t in things]
    thing = things[int(draws[0] * len(things))]
    if shapes.count(thing.shape) == 1:
        ask("color", f"what color is the {thing.shape}?", thing.color)
    if colors.count(thing.color) == 1:
        ask("shape", f"what shape is the {thing.color} object?", thing.shape)
    if draws[1] < yes:
        ask("exists", f"is there {a(thing.name)}?", "yes")
    else:
        present = {t.name for t in things}
        # Half of what is asked for in vain shares its color with something there, half its shape.
        names = (
            [f"{thing.color} {s}" for s in SHAPES]
            if draws[2] < 0.5
            else [f"{c} {thing.shape}" for c in COLORS]
        )
        absent = [name for name in names if name not in present]
        ask("exists", f"is there {a(absent[int(draws[3] * len(absent))])}?", "no")
    relations = scene.relations
    if relations:
        i, name, j = relations[int(draws[4] * len(relations))]
        holds = draws[5] < yes
        said = name if holds else OPPOSITE[name]
        ask("relation", f"is the {things[i].name} {said} the {things[j].name}?", "yes" if holds else "no")
    return out
