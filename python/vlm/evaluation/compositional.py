"""Compositional understanding: is a picture nearer to its caption than to the same words put together wrongly?

A choice is a picture, its caption and a wrong one; it is right when the caption's cosine is the greater, and ties count against the
model. Wrong captions are made by exchange within the scene graph, or are fields of the data. Where two samples are a pair (each
picture fits its own caption alone), the pair is scored by text, by picture and as a whole. Source: structure-clip.

n samples, c choices, E embedding width.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vlm.config.errors import DataError
from vlm.data.scene_swap import SwapMode, swaps
from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.material import Material, clean
from vlm.evaluation.result import Result, figures
from vlm.evaluation.shuffling import derangement
from vlm.evaluation.task import Fields, Task, as_fields
from vlm.evaluation.thumbnail import thumbnails


class CompositionalOptions(Task):
    """Choice between a true caption and a wrong one, per kind of mistake, in percent."""

    task: Literal["compositional"] = "compositional"
    modes: tuple[SwapMode, ...] = Field(
        ("relation", "attribute"), min_length=1, description="what is exchanged in a caption to make it wrong"
    )
    wrong_from: Fields | None = Field(
        None, description="fields with wrong captions of a sample's first text, each a kind by its name; none: they are made"
    )
    pairs_from: str | None = Field(
        None, description="field that two samples share which are a pair, for text, image and group score; none: no pairs"
    )

    @model_validator(mode="after")
    def _read(self) -> CompositionalOptions:
        self.read_only_where(self.wrong_from is None, "no wrong_from", "modes")
        taken = sorted({"accuracy", "shuffled", "over_shuffled", "pairs"} & set(as_fields(self.wrong_from or ())))
        if taken:
            raise ValueError(f"wrong_from: a figure is called {taken[0]!r}; give the field another name")
        return self

    def run(self, material: Material) -> Result:
        return compositional(material, self)


@dataclass(frozen=True)
class Choice:
    """One question to the model: does picture `sample` say `true` or `wrong`?"""

    sample: int
    kind: str
    true: str
    wrong: str


def choices_of(material: Material, options: CompositionalOptions) -> list[Choice]:
    """The choices in the order of samples and texts. Of what one caption could become by a mode, one is drawn by the seed."""
    return list(_from_fields(material, options) if options.wrong_from is not None else _made(material, options))


def _made(material: Material, options: CompositionalOptions) -> Iterator[Choice]:
    for sample, texts in enumerate(material.texts):
        generator = np.random.default_rng([options.seed, 7, sample])
        for text in texts:
            for mode in options.modes:
                # Another true caption of the sample is not wrong.
                found = [one.text for one in swaps(text, (mode,)) if one.text not in texts]
                if found:
                    yield Choice(sample, mode, text, found[int(generator.integers(len(found)))])


def _from_fields(material: Material, options: CompositionalOptions) -> Iterator[Choice]:
    for sample, texts in enumerate(material.texts):
        for kind in as_fields(options.wrong_from or ()):
            wrong = material.fields[sample].get(kind)
            if texts and isinstance(wrong, str) and clean(wrong) and clean(wrong) != texts[0]:
                yield Choice(sample, kind, texts[0], clean(wrong))


def compositional(material: Material, options: CompositionalOptions) -> Result:
    """accuracy over all choices and of each kind; `shuffled`: with the picture of another concept, which shows what is told from the
    texts alone, and `over_shuffled`: the difference. `pairs`: text, image and group.

    Raises DataError when there is neither a choice nor a pair.
    """
    choices = choices_of(material, options)
    pairs = pairs_of(material, options.pairs_from) if options.pairs_from is not None else []
    if not choices and not pairs:
        raise DataError(
            "no caption can be made wrong, and no two samples are a pair",
            remedy="captions need two objects with a relation or attributes, or name the fields: wrong_from, pairs_from",
        )
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    chance: dict[str, Any] = {}
    details: dict[str, Any] = {"choices": len(choices), "pairs": len(pairs)}
    examples: list[dict[str, Any]] = []
    if choices:
        samples = np.array([choice.sample for choice in choices])
        gap = gaps(material, choices, samples)
        known = material.concepts()
        concepts: list[Hashable] = [(1, i) if known[i] is None else (0, known[i]) for i in samples.tolist()]
        kinds = list(dict.fromkeys(choice.kind for choice in choices))
        names = ["accuracy", *kinds]
        of_kind = np.stack([np.ones(len(choices)), *(np.array([c.kind == kind for c in choices], float) for kind in kinds)], axis=1)
        given: dict[str, NDArray[np.float64]] = {"": (gap > 0).astype(float)}
        giver = _others(material, options.seed)
        if giver is not None:
            given["shuffled"] = (gaps(material, choices, giver[samples]) > 0).astype(float)
            given["over_shuffled"] = given[""] - given["shuffled"]
        for where, right in given.items():
            estimate = bootstrap(
                right[:, None] * of_kind, of_kind, clusters=concepts, resamples=options.resamples, seed=options.seed,
                share=where != "over_shuffled",
            )  # fmt: skip
            values, bounds = figures(names, estimate, 100.0)
            levels = dict.fromkeys(names, 0.0 if where == "over_shuffled" else 50.0)
            for tree, part in ((metrics, values), (intervals, bounds), (chance, levels)):
                tree.update({where: part} if where else part)
        details |= {
            "clusters": len(set(concepts)),
            "choices_of": {kind: int(of_kind[:, 1 + k].sum()) for k, kind in enumerate(kinds)},
            "mean_gap": round(float(gap.mean()), 6),
        }
        examples = _examples(material, choices, gap, options) if options.examples else []
    if pairs:
        values, bounds = _paired(material, pairs, options)
        metrics["pairs"], intervals["pairs"] = values, bounds
        chance["pairs"] = {"text": 25.0, "image": 25.0, "group": round(100 / 6, 6)}
    return Result(
        task="compositional",
        name=options.title,
        samples=len({choice.sample for choice in choices} | {i for pair in pairs for i in pair}),
        metrics=metrics,
        intervals=intervals,
        chance=chance,
        details=details,
        examples=examples,
    )


def gaps(material: Material, choices: list[Choice], pictures: NDArray[np.int64]) -> NDArray[np.float32]:
    """[c]: by how much the cosine of each choice's true caption is the greater; pictures [c]: which picture it is asked of."""
    assert material.images is not None
    true, wrong = (material.embed_texts([getattr(choice, side) for choice in choices]) for side in ("true", "wrong"))
    images = material.images[pictures]
    difference: NDArray[np.float32] = (images * true).sum(1) - (images * wrong).sum(1)
    return difference


def pairs_of(material: Material, field: str) -> list[tuple[int, int]]:
    """The pairs of samples that share a value of the field and differ in their first text.

    Raises DataError for a value that more than two samples have.
    """
    found: dict[Hashable, list[int]] = {}
    for sample, fields in enumerate(material.fields):
        value = fields.get(field)
        if isinstance(value, str | int) and material.texts[sample]:
            found.setdefault(value, []).append(sample)
    for value, own in found.items():
        if len(own) > 2:
            raise DataError(f"{len(own)} samples have the {field} {str(value)[:40]!r}, a pair has two", remedy="name another field: pairs_from")
    return [(own[0], own[1]) for own in found.values() if len(own) == 2 and material.texts[own[0]][0] != material.texts[own[1]][0]]


def pair_scores(similarity: NDArray[np.float32]) -> NDArray[np.float64]:
    """similarity [p, 2, 2] of pictures and texts of each pair -> [p, 3]: text, image, group score, 0 or 1 (Winoground).

    text: each picture is nearer to its own text; image: each text to its own picture; group: both.
    """
    own = np.diagonal(similarity, axis1=1, axis2=2)
    text = (own[:, 0] > similarity[:, 0, 1]) & (own[:, 1] > similarity[:, 1, 0])
    image = (own[:, 0] > similarity[:, 1, 0]) & (own[:, 1] > similarity[:, 0, 1])
    return np.stack([text, image, text & image], axis=1).astype(np.float64)


def _paired(material: Material, pairs: list[tuple[int, int]], options: CompositionalOptions) -> tuple[dict[str, float], dict[str, Any]]:
    assert material.images is not None
    rows = np.array(pairs)
    texts = material.embed_texts([material.texts[i][0] for i in rows.ravel().tolist()]).reshape(len(pairs), 2, -1)
    similarity = np.einsum("pie,pje->pij", material.images[rows], texts)
    estimate = bootstrap(pair_scores(similarity), resamples=options.resamples, seed=options.seed, share=True)
    return figures(("text", "image", "group"), estimate, 100.0)


def _others(material: Material, seed: int) -> NDArray[np.int64] | None:
    """Whose picture each sample gets for the control; None where all are of one concept."""
    try:
        return derangement(material.concepts(), seed)[0]
    except DataError:
        return None


def _examples(
    material: Material, choices: list[Choice], gap: NDArray[np.float32], options: CompositionalOptions
) -> list[dict[str, Any]]:
    """The first choices of a seeded shuffle, whatever their outcome."""
    order = np.random.default_rng([options.seed, 1]).permutation(len(choices))[: options.examples].tolist()
    small = thumbnails(material.pictures(sorted({choices[k].sample for k in order})))
    return [
        {
            "key": material.keys[choices[k].sample],
            "picture": small.get(choices[k].sample),
            "kind": choices[k].kind,
            "true": choices[k].true,
            "wrong": choices[k].wrong,
            "gap": float(gap[k]),
            "right": bool(gap[k] > 0),
        }
        for k in order
    ]
