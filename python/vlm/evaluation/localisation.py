"""Where a phrase lies for a model that embeds: the patch nearest to it, against the object's box. Source: dreamlip.

The patch is the one of the greatest cosine with the phrase. Ties count against the model: a wrong patch as near as the best
right one stands before it. n pictures, P patches, q phrases, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from vlm.config.errors import DataError, RequestError
from vlm.data.boxes import box_text, seen_box
from vlm.data.samples import BadSample, field_at
from vlm.data.streams.conversation import Box, regions_of
from vlm.data.streams.options import Regions
from vlm.evaluation.bootstrap import bootstrap
from vlm.evaluation.material import CONCEPT, BadTally, Fingerprint, Floats, Item, readable, unit
from vlm.evaluation.ranking import TIE
from vlm.evaluation.result import Result, figures
from vlm.evaluation.task import Task
from vlm.evaluation.thumbnail import thumbnail
from vlm.evaluation.writing import balanced, need
from vlm.runtime.preprocess import Preprocess

NAMES = ("accuracy", "quadrant")


class LocalisationOptions(Task):
    """Each object that its phrase alone names is looked for among the patches; figures in percent.

    accuracy: the middle of the nearest patch lies in the object's box, or the patch holds the middle of the box; quadrant: it
    lies in the quarter of the picture that the middle of the box lies in.
    """

    task: Literal["localisation"] = "localisation"
    column: str = Field("objects", description="field with the list of objects")
    phrase: str = Field("a {color} {shape}", description="the text of an object, with its fields in braces")
    box: str = Field("box", description="field of an object with [x0, y0, x1, y1], shares of the stored picture")


class PatchEmbedder(Protocol):
    """What the task asks of a model."""

    preprocess: Preprocess

    def encode_patches(self, pictures: Sequence[Any]) -> Floats: ...
    def encode_text(self, texts: Sequence[str]) -> Floats: ...


@dataclass(frozen=True)
class Looked:
    """One phrase. sample: number of its picture; near: [P] its cosine with each patch; box: as the model sees it."""

    sample: int
    phrase: str
    near: Floats
    box: Box


def right_patches(box: Box, side: int) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which of side x side patches, in raster order, count as within the box and as within its quadrant; each [P], never none."""
    middles = (np.arange(side) + 0.5) / side
    x, y = np.tile(middles, side), np.repeat(middles, side)
    across, down = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    inside = (box[0] <= x) & (x <= box[2]) & (box[1] <= y) & (y <= box[3])
    inside[min(int(down * side), side - 1) * side + min(int(across * side), side - 1)] = True
    # A side of one patch has its middle at 1/2, where no quadrant ends: it lies in every one.
    quadrant = ((x >= 0.5) == (across >= 0.5)) & ((y >= 0.5) == (down >= 0.5)) if side > 1 else np.ones(1, bool)
    return inside, quadrant


def beats(near: Floats, right: NDArray[np.bool_]) -> bool:
    """Whether the best right patch is nearer than every wrong one. near [P] cosines."""
    wrong = near[~right]
    return bool(right.any()) and (not len(wrong) or bool(near[right].max() > wrong.max() + TIE))


def localisation(
    embedder: Any,
    items: Iterable[Item],
    options: LocalisationOptions,
    bad: BadTally,
    *,
    reread: Callable[[int], Image.Image],
    batch: int = 64,
) -> Result:
    """Intervals draw concepts (or samples) with all their objects. chance: a patch drawn blindly. reread: a picture by its place
    in the source.

    Raises RequestError for a model whose patches cannot be told by place, DataError where there is nothing to look for, or a
    field holds no boxes (by the sample's key).
    """
    if not hasattr(embedder, "encode_patches"):
        raise RequestError("localisation needs a model that embeds patches", remedy="evaluate the run instead of its bundle")
    kept: list[tuple[str, int]] = []
    concepts: list[Hashable] = []
    found: list[Looked] = []
    fingerprint = Fingerprint()
    for part in _batches(items, bad, fingerprint, batch):
        patches = unit(embedder.encode_patches([picture for _, picture in part]), "patch")
        wanted = [_wanted(item, picture, options, embedder.preprocess) for item, picture in part]
        phrases = list(dict.fromkeys(phrase for own in wanted for phrase, _ in own))
        rows = dict(zip(phrases, unit(embedder.encode_text(phrases), "text"))) if phrases else {}
        for (item, _), near, own in zip(part, patches, wanted):
            sample = len(kept)
            kept.append((item.key, item.index))
            concept = item.fields.get(CONCEPT)
            concepts.append((0, concept) if isinstance(concept, str | int) else (1, sample))
            found += [Looked(sample, phrase, near @ rows[phrase], box) for phrase, box in own]
    bad.check()
    need(
        len(found),
        f"no object with a box in {options.column!r} ({options.box!r}) that {options.phrase!r} alone names",
        "name the fields in the preset: column, box, phrase",
    )
    side = _side(len(found[0].near))
    right = [right_patches(one.box, side) for one in found]
    hits = np.array([[beats(one.near, own) for own in both] for one, both in zip(found, right)], np.float64)
    estimate = bootstrap(
        hits, clusters=[concepts[one.sample] for one in found], resamples=options.resamples, seed=options.seed, share=True
    )
    metrics, intervals = figures(NAMES, estimate, 100.0)
    shares = np.array(right, np.float64).mean(0)  # [2, P]: how often each patch is right
    details: dict[str, Any] = {
        "phrases": len(found),
        "patches": side * side,
        "clusters": estimate.clusters,
        "best_fixed_patch": {name: round(100 * float(v), 6) for name, v in zip(NAMES, shares.max(1))},
    }
    return Result(
        task="localisation",
        name=options.title,
        samples=len({one.sample for one in found}),
        metrics=metrics,
        intervals=intervals,
        chance={name: round(100 * float(v), 6) for name, v in zip(NAMES, shares.mean(1))},
        details=details,
        examples=_examples(found, hits[:, 0] > 0, kept, reread, side, options),
        data={"sha256": fingerprint.hexdigest()},
        bad=bad.as_json(),
    )


def _batches(
    items: Iterable[Item], bad: BadTally, fingerprint: Fingerprint, batch: int
) -> Iterator[list[tuple[Item, Image.Image]]]:
    """Good samples with their pictures, so many at a time."""
    waiting: list[tuple[Item, Image.Image]] = []
    for item, picture in readable(items, bad):
        fingerprint.add(item, picture)
        waiting.append((item, picture))
        if len(waiting) == batch:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _wanted(item: Item, picture: Image.Image, options: LocalisationOptions, preprocess: Preprocess) -> list[tuple[str, Box]]:
    """(phrase, box as the model sees it) of each object that is seen and named by its phrase alone."""
    entries = field_at(dict(item.fields), options.column)
    if entries is None:
        return []
    table = Regions(column=options.column, phrase=options.phrase, box=options.box)
    try:
        seen = regions_of(
            entries if isinstance(entries, list) else [entries], table, lambda box: seen_box(box, *picture.size, preprocess)
        )
    except BadSample as error:
        raise DataError(error.message, where=item.key) from None
    return [(phrase, box) for phrase, box, _ in seen]


def _side(patches: int) -> int:
    side = isqrt(patches)
    if side * side != patches:
        raise RequestError(f"{patches} patches are no square: localisation wants those of one square picture, none merged")
    return side


def _examples(
    found: Sequence[Looked],
    right: NDArray[np.bool_],
    kept: Sequence[tuple[str, int]],
    reread: Callable[[int], Image.Image],
    side: int,
    options: LocalisationOptions,
) -> list[dict[str, Any]]:
    """As many right as wrong, in turns, each the first of a seeded shuffle."""
    out = []
    for i in balanced(right, options.examples, options.seed):
        one = found[i]
        row, column = divmod(int(one.near.argmax()), side)
        patch = (column / side, row / side, (column + 1) / side, (row + 1) / side)
        out.append(
            {
                "direction": "localisation",
                "key": kept[one.sample][0],
                "picture": thumbnail(reread(kept[one.sample][1])),
                "question": one.phrase,
                "answer": box_text(patch, 2),
                "truth": [box_text(one.box, 2)],
                "right": bool(right[i]),
                "controls": {},
            }
        )
    return out
