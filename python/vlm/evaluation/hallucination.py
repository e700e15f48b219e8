"""Objects that a model names although the picture does not show them: in captions, and when asked by yes or no.

n samples. Sources: povid (captions and probes), Li et al., "Evaluating object hallucination in large vision-language
models" (how absent objects are chosen), debias-lvlm (yes-no figures).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from vlm.data.samples import field_at
from vlm.evaluation.classes import read_classes
from vlm.evaluation.controlled import MAIN, Figures, controlled, ratio
from vlm.evaluation.material import clean
from vlm.evaluation.pictured import Pictured
from vlm.evaluation.result import Result
from vlm.evaluation.shuffling import Control
from vlm.evaluation.text_metrics import (
    YES_NO_COUNTED,
    YES_NO_FIGURES,
    ObjectNames,
    hallucination_statistics,
    said_yes,
    yes_no_of,
    yes_no_statistics,
)
from vlm.evaluation.thumbnail import thumbnails
from vlm.evaluation.writing import Ask, WritingTask, arms_of, balanced, filled, need, one_place, written

Floats = NDArray[np.float64]
Absent = Literal["random", "popular", "adversarial"]

_COMBINATIONS = 20_000
"""Beyond so many combinations of keys only the names that occur are objects."""


class HallucinationOptions(WritingTask):
    """Percent of object mentions in captions that are not in the picture, and yes-no figures of as many present as
    absent objects."""

    task: Literal["hallucination"] = "hallucination"
    controls: tuple[Control, ...] = Field((), description="as for vqa: shuffled, none")
    prompt: str = Field("Describe the picture.", min_length=1, description="what asks for a caption")
    captions: bool = Field(True, description="ask for captions")
    objects: str = Field("objects", description="field with the list of a picture's objects: names, or tables")
    object_keys: tuple[str, ...] = Field(
        ("color", "shape"),
        min_length=1,
        description="keys of a table that together name an object; the last ones alone name it too",
    )
    names: str | None = Field(
        None,
        description="file of object names, as classes of zero-shot; default: those that the data hold, in all combinations",
    )
    probe: str = Field("Is there {}?", description="yes-no question, with {} for the object")
    article: bool = Field(True, description="the object of a probe has its article: a circle, an arrow")
    probes: int = Field(1, ge=0, description="present objects asked for in each picture, and as many absent ones")
    absent: Absent = Field(
        "random",
        description="absent objects asked for: any, the most frequent in the data, or the most often seen with those present",
    )

    @field_validator("probe")
    @classmethod
    def _one(cls, value: str) -> str:
        return one_place(value)

    def run(self, samples: Pictured, batch: int) -> Result:
        return hallucination(samples, self, batch)


class Inventory:
    """What every picture shows, and which objects there are.

    full: each picture's objects by their whole names, without repetition; present: with the shorter names that hold
    of them too; listed: all whole names; names: what a text may call an object.
    """

    def __init__(self, fields: Sequence[Mapping[str, Any]], options: HallucinationOptions) -> None:
        self.full: list[list[str]] = []
        self.present: list[set[str]] = []
        values: list[dict[str, None]] = [{} for _ in options.object_keys]
        plain: dict[str, None] = {}
        for one in fields:
            found = field_at(dict(one), options.objects)
            names: dict[str, None] = {}
            shorter: set[str] = set()
            for entry in found if isinstance(found, list) else ():
                parts = _parts(entry, options.object_keys)
                if not parts:
                    continue
                names[" ".join(parts)] = None
                shorter |= {" ".join(parts[k:]) for k in range(len(parts))}
                if len(parts) == len(options.object_keys) > 1:
                    for known, part in zip(values, parts):
                        known[part] = None
                else:
                    plain[" ".join(parts)] = None
            self.full.append(list(names))
            self.present.append(shorter)
        seen = dict.fromkeys(name for names in self.full for name in names)
        many = math.prod(map(len, values)) > _COMBINATIONS
        combined = [] if many or not values[0] else [" ".join(parts) for parts in product(*values)]
        self.listed = list(dict.fromkeys([*plain, *combined, *seen]))
        tails = [] if many else [" ".join(p) for k in range(1, len(values)) for p in product(*values[k:])]
        if options.names is not None:
            entries = read_classes(options.names)
            self.listed = [entry.label for entry in entries]
            self.names = ObjectNames.of(self.listed, {entry.label: entry.names for entry in entries})
        else:
            self.names = ObjectNames.of(dict.fromkeys([*self.listed, *tails]))


def _parts(entry: Any, keys: Sequence[str]) -> list[str]:
    if isinstance(entry, str):
        return [clean(entry)] if clean(entry) else []
    if not isinstance(entry, Mapping):
        return []
    found = [clean(str(entry[key])) for key in keys if isinstance(entry.get(key), str)]
    return found or _parts(entry.get("name") if isinstance(entry.get("name"), str) else None, keys)


def absent_objects(inventory: Inventory, how: Absent, count: int, seed: int) -> list[list[str]]:
    """`count` objects for each picture that it does not show (fewer where there are not so many). Equally frequent
    ones come in a seeded order."""
    times = Counter(name for names in inventory.full for name in names)
    beside: dict[str, Counter[str]] = {}
    for names in inventory.full:
        for name in names:
            beside.setdefault(name, Counter()).update(other for other in names if other != name)
    out = []
    for number, (names, present) in enumerate(zip(inventory.full, inventory.present)):
        candidates = [name for name in inventory.listed if name not in present]
        order = np.random.default_rng([seed, 11, number]).permutation(len(candidates))
        shuffled = [candidates[i] for i in order.tolist()]
        if how == "popular":
            shuffled.sort(key=lambda name: -times[name])
        elif how == "adversarial":
            together: Counter[str] = Counter()
            for name in names:
                together.update(beside[name])
            shuffled.sort(key=lambda name: -together[name])
        out.append(shuffled[:count])
    return out


def _with_article(name: str) -> str:
    return f"{'an' if name[:1].lower() in tuple('aeiou') else 'a'} {name}"


def probes_of(inventory: Inventory, options: HallucinationOptions) -> list[tuple[int, str, bool]]:
    """(sample, object, whether it is there), as many present as absent ones in every picture."""
    absent = absent_objects(inventory, options.absent, options.probes, options.seed)
    out = []
    for number, (names, others) in enumerate(zip(inventory.full, absent)):
        order = np.random.default_rng([options.seed, 12, number]).permutation(len(names)).tolist()
        count = min(options.probes, len(names), len(others))
        out += [(number, names[i], True) for i in order[:count]]
        out += [(number, name, False) for name in others[:count]]
    return out


def hallucination_figures(captions: bool, probes: bool) -> Figures:
    """Of sums of the five statistics of captions and the five of yes and no."""
    paths: tuple[str, ...] = ()
    scale: tuple[float, ...] = ()
    counted: tuple[tuple[int, ...] | None, ...] = ()
    if captions:
        paths += ("absent_object_rate", "captions_with_absent", "mentions", "objects_named")
        scale += (100.0, 100.0, 1.0, 1.0)
        counted += ((1,), (3,), None, None)
    if probes:
        paths += tuple(f"yes_no/{name}" for name in YES_NO_FIGURES)
        scale += (100.0,) * len(YES_NO_FIGURES)
        counted += tuple(c and tuple(5 + k for k in c) for c in YES_NO_COUNTED)

    def of(sums: Floats) -> Floats:
        absent, mentions, with_absent, texts, named = (sums[..., k] for k in range(5))
        parts = [ratio(absent, mentions), ratio(with_absent, texts), ratio(mentions, texts), ratio(named, texts)]
        parts = parts if captions else []
        if probes:
            figures = yes_no_of(sums[..., 5:])
            parts += [figures[..., k] for k in range(len(YES_NO_FIGURES))]
        return np.stack(parts, axis=-1)

    return Figures(paths, of, scale, counted)


def hallucination(samples: Pictured, options: HallucinationOptions, batch: int) -> Result:
    """Raises DataError when no picture has its objects listed.

    A picture whose objects are not listed is left out. Without any mention the rate of absent objects is left out.
    """
    kept = [i for i, fields in enumerate(samples.fields) if field_at(dict(fields), options.objects)]
    inventory = Inventory([samples.fields[i] for i in kept], options)
    need(
        sum(map(len, inventory.full)),
        f"no picture with a list of objects in {options.objects!r}",
        "name the field with objects in the preset",
    )
    probes = probes_of(inventory, options)
    arms, permutes = arms_of(samples, options.controls, options.seed)
    captions = [Ask(i, options.prompt) for i in kept] if options.captions else []
    asked = [
        Ask(kept[place], filled(options.probe, _with_article(name) if options.article else name))
        for place, name, _ in probes
    ]
    need(len(captions) + len(asked), "nothing to ask", "set captions = true, or probes above 0")
    texts = written(samples, captions, arms, options.settings(), batch)
    answers = written(samples, asked, arms, options.settings(), batch)
    statistics = {}
    for arm in arms:
        rows = np.zeros((len(kept), 10))
        if captions:
            named = [inventory.names.named(text) for text in texts[arm]]
            rows[:, :5] = hallucination_statistics(named, inventory.present)
        said = [said_yes(answer) for answer in answers[arm]]
        places = np.array([place for place, _, _ in probes], dtype=np.int64)
        np.add.at(rows[:, 5:], places, yes_no_statistics(said, [there for _, _, there in probes]))
        statistics[arm] = rows
    figures = hallucination_figures(bool(captions), bool(probes))
    concepts = samples.concepts()
    found = controlled(
        statistics,
        figures,
        clusters=[concepts[i] for i in kept],
        resamples=options.resamples,
        seed=options.seed,
    )
    chance: dict[str, Any] = {"yes_no": {"accuracy": 50.0, "f1": round(200 / 3, 6)}} if probes else {}
    details: dict[str, Any] = {
        "objects": len(inventory.listed),
        "without_objects": len(samples) - len(kept),
        "probes": len(probes),
        "absent": options.absent,
        "clusters": found.clusters,
    }
    if "shuffled" in arms:
        details["shuffled"] = "permutation" if permutes else "drawn with replacement: one concept has over half"
    examples = _examples(samples, kept, inventory, texts, statistics[MAIN], options) if captions else []
    return Result(
        task="hallucination",
        name=options.title,
        samples=len(kept),
        metrics=found.metrics,
        intervals=found.intervals,
        chance=chance,
        details=details,
        examples=examples,
    )


def _examples(
    samples: Pictured,
    kept: list[int],
    inventory: Inventory,
    texts: dict[str, list[str]],
    rows: Floats,
    options: HallucinationOptions,
) -> list[dict[str, Any]]:
    """As many captions with an absent object as without, in turns, each the first of a seeded shuffle."""
    good = rows[:, 0] == 0
    chosen = balanced(good, options.examples, options.seed)
    small = thumbnails(samples.pictures(kept[i] for i in chosen))
    out = []
    for i in chosen:
        named = inventory.names.named(texts[MAIN][i])
        out.append(
            {
                "direction": "hallucination",
                "key": samples.keys[kept[i]],
                "picture": small.get(kept[i]),
                "question": options.prompt,
                "answer": texts[MAIN][i],
                "truth": inventory.full[i],
                "absent": [name for name in named if name not in inventory.present[i]],
                "right": bool(good[i]),
                "controls": {arm: answers[i] for arm, answers in texts.items() if arm},
            }
        )
    return out
