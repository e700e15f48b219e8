"""Retrieval in both directions: does a picture find its text, and a text its picture?

Several pictures may share one text. image_to_text: every picture is a query, the candidates are the distinct
texts, a hit is any of the picture's own texts. text_to_image: every distinct text is a query, the candidates are
all pictures, a hit is any picture with that text. Ties count against the model. Sources: clip, siglip.

n pictures, t distinct texts, E embedding width.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vlm.config.errors import DataError
from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.material import Material
from vlm.evaluation.ranking import Floats, Integers, chance_at, first_places, ranks
from vlm.evaluation.result import Result, figures
from vlm.evaluation.task import Task
from vlm.evaluation.thumbnail import thumbnails

SHOWN = 5


class RetrievalOptions(Task):
    """Recall at cutoffs of pictures by text and texts by picture, in percent."""

    task: Literal["retrieval"] = "retrieval"
    cutoffs: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="r@K for each of these")

    def run(self, material: Material) -> Result:
        return retrieval(material, self)


@dataclass(frozen=True)
class Ranked:
    """image_rank [n], text_rank [t]: places from 1; pairs [P, 2]: (picture, text); texts: the t distinct ones."""

    image_rank: Integers
    text_rank: Integers
    pairs: Integers
    texts: list[str]


def distinct_texts(texts: Sequence[tuple[str, ...]]) -> tuple[list[str], Integers]:
    """The distinct texts in order of appearance, and (sample, text) pairs [P, 2]."""
    numbers: dict[str, int] = {}
    pairs = [(i, numbers.setdefault(text, len(numbers))) for i, own in enumerate(texts) for text in own]
    return list(numbers), np.array(pairs, dtype=np.int64).reshape(-1, 2)


def rank_both(images: Floats, texts: Floats, pairs: Integers) -> tuple[Integers, Integers]:
    """(rank of each picture's best own text [n], rank of each text's best own picture [t]).

    images [n, E], texts [t, E]: unit rows; pairs [P, 2]: (picture, text).
    """
    return ranks(images, texts, pairs), ranks(texts, images, pairs[:, ::-1])


def recalls(rank: Integers, cutoffs: Sequence[int]) -> NDArray[np.float64]:
    """[Q, len(cutoffs)] 1 where the rank is within the cutoff."""
    return (rank[:, None] <= np.asarray(cutoffs)[None]).astype(np.float64)


def retrieval(material: Material, options: RetrievalOptions) -> Result:
    """Raises DataError when fewer than two distinct texts are there to choose from."""
    assert material.images is not None
    kept = [i for i, own in enumerate(material.texts) if own]
    texts, pairs = distinct_texts([material.texts[i] for i in kept])
    if len(texts) < 2:
        raise DataError(
            f"{len(texts)} distinct texts among {len(material)} samples, retrieval needs at least 2",
            remedy="see the captions with: vlm data inspect URI",
        )
    images = material.images[kept]
    rows = material.embed_texts(texts)
    image_rank, text_rank = rank_both(images, rows, pairs)
    # Texts of one picture are no independent evidence: without a concept the sample is the cluster.
    known = material.concepts()
    concepts: list[Hashable] = [(1, i) if known[i] is None else (0, known[i]) for i in kept]
    of_text: list[Hashable] = [None] * len(texts)
    for sample, text in reversed(pairs.tolist()):
        of_text[text] = concepts[sample]
    names = [f"r@{k}" for k in options.cutoffs]
    metrics: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    chance: dict[str, Any] = {}
    details: dict[str, Any] = {"without_text": len(material) - len(kept)}
    for direction, rank, clusters, rights, candidates in (
        ("image_to_text", image_rank, concepts, np.bincount(pairs[:, 0], minlength=len(kept)), len(texts)),
        ("text_to_image", text_rank, of_text, np.bincount(pairs[:, 1], minlength=len(texts)), len(kept)),
    ):
        estimate = bootstrap(
            recalls(rank, options.cutoffs),
            clusters=clusters,
            resamples=options.resamples,
            seed=options.seed,
            share=True,
        )
        metrics[direction], intervals[direction] = figures(names, estimate, 100.0)
        level = chance_at(rights, candidates, options.cutoffs)
        chance[direction] = {name: round(100 * float(v), 6) for name, v in zip(names, level)}
        details[direction] = {
            "queries": len(rank),
            "candidates": candidates,
            "clusters": estimate.clusters,
            "median_rank": float(np.median(rank)),
        }
    found = Ranked(image_rank, text_rank, pairs, texts)
    examples = _examples(material, kept, images, rows, found, options) if options.examples else []
    return Result(
        task="retrieval",
        name=options.title,
        samples=len(kept),
        metrics=metrics,
        intervals=intervals,
        chance=chance,
        details=details,
        examples=examples,
    )


def _examples(
    material: Material,
    kept: list[int],
    images: Floats,
    rows: Floats,
    found: Ranked,
    options: RetrievalOptions,
) -> list[dict[str, Any]]:
    """The first queries of a seeded shuffle in each direction, whatever their outcome."""
    generator = np.random.default_rng([options.seed, 1])
    text_queries = generator.permutation(len(rows))[: options.examples]
    image_queries = generator.permutation(len(images))[: options.examples]
    by_text = rows[text_queries] @ images.T
    by_image = images[image_queries] @ rows.T
    pictures_shown = first_places(by_text, SHOWN)
    texts_shown = first_places(by_image, SHOWN)
    wanted = {kept[i] for i in (*pictures_shown.ravel().tolist(), *image_queries.tolist())}
    small = thumbnails(material.pictures(sorted(wanted)))
    own = {(int(i), int(t)) for i, t in found.pairs}
    out: list[dict[str, Any]] = []
    for row, t in enumerate(text_queries.tolist()):
        hits = [
            {
                "key": material.keys[kept[i]],
                "picture": small.get(kept[i]),
                "score": float(by_text[row, i]),
                "right": (i, t) in own,
            }
            for i in pictures_shown[row].tolist()
        ]
        out.append(
            {
                "direction": "text_to_image",
                "query": found.texts[t],
                "rank": int(found.text_rank[t]),
                "found": hits,
            }
        )
    for row, i in enumerate(image_queries.tolist()):
        texts = [
            {"text": found.texts[t], "score": float(by_image[row, t]), "right": (i, t) in own}
            for t in texts_shown[row].tolist()
        ]
        out.append(
            {
                "direction": "image_to_text",
                "key": material.keys[kept[i]],
                "picture": small.get(kept[i]),
                "truth": list(material.texts[kept[i]]),
                "rank": int(found.image_rank[i]),
                "found": texts,
            }
        )
    return out
