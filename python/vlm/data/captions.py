"""Caption policies: which texts of a sample become rows of the stream `text`."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from vlm.data.samples import BadSample, clean_text, field_at

AUTO_TEXT = ("txt", "caption", "text", "title")


def text_values(fields: dict[str, Any], column: str) -> list[Any]:
    """The texts of a column (a list gives all its entries). Raises BadSample when there is none."""
    for path in AUTO_TEXT if column == "auto" else (column,):
        values = _optional(fields, path)
        if values:
            return values
    raise BadSample(
        "missing_text", "none of " + ", ".join(AUTO_TEXT) if column == "auto" else f"field {column}"
    )


def _optional(fields: dict[str, Any], path: str) -> list[Any]:
    value = field_at(fields, path)
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def sentences(text: str, marks: list[str]) -> list[str]:
    """The parts of a text that end with one of `marks` and a blank or the end, in order, with their marks."""
    ends = "|".join(re.escape(mark) + (r"(?=\s|$)" if mark.strip() else "") for mark in marks)
    parts = re.split(f"((?:{ends})+)", text)
    joined = [a + b for a, b in zip(parts[::2], [*parts[1::2], ""])]
    return [part.strip() for part in joined if part.strip(" \n\t" + "".join(marks))]


def choose(
    fields: dict[str, Any], column: str, policy: dict[str, Any], max_text: int, key: int
) -> list[str | None]:
    """The texts of a sample by slot under a caption policy (as JSON), drawn from `key`; None where a slot is empty.

    Raises BadSample when there is no usable text.
    """
    kind = policy["kind"]
    if kind in ("one", "several") or (kind == "random" and not policy["columns"]):
        values = text_values(fields, column)
        return [clean_text(values[place], max_text) for place in places(len(values), policy, key)]
    generator = np.random.Generator(np.random.Philox(key=key))
    if kind == "mix":
        return [_mixed(fields, policy["weights"], max_text, generator)]
    columns = policy["columns"]
    values = [v for name in columns for v in _optional(fields, name)] if columns else text_values(fields, column)
    if kind == "random":
        if not values:
            raise BadSample("missing_text", "none of " + ", ".join(columns))
        return [clean_text(values[int(generator.integers(len(values)))], max_text)]
    if kind == "length":
        return [_by_length([clean_text(value, max_text) for value in values], policy, generator)]
    return _sentences(fields, values, policy, max_text, generator)


def places(count: int, policy: dict[str, Any], key: int) -> list[int]:
    """Which of `count` texts of the text column are taken, ascending: for policies that take whole texts of it."""
    if policy["kind"] == "one":
        return [0]
    generator = np.random.Generator(np.random.Philox(key=key))
    if policy["kind"] == "random":
        return [int(generator.integers(count))]
    return sorted(generator.permutation(count)[: policy["k"]].tolist())


def _mixed(fields: dict[str, Any], weights: dict[str, float], max_text: int, generator: np.random.Generator) -> str:
    """A text of a field drawn by weight among those that the sample has."""
    found = {name: values for name in weights if (values := _optional(fields, name))}
    if not found:
        raise BadSample("missing_text", "none of " + ", ".join(weights))
    u, v = generator.random(2).tolist()
    ends = np.cumsum([weights[name] for name in found])
    place = min(int(np.searchsorted(ends, u * ends[-1], side="right")), len(found) - 1)
    values = list(found.values())[place]
    return clean_text(values[int(v * len(values))], max_text)


def _by_length(texts: list[str], policy: dict[str, Any], generator: np.random.Generator) -> str:
    """One of the texts whose number of words lies within the bounds, or as the policy says where none does."""
    words = [len(text.split()) for text in texts]
    fitting = [text for text, count in zip(texts, words) if policy["least"] <= count <= policy["most"]]
    if fitting:
        return fitting[int(generator.integers(len(fitting)))]
    if not texts or policy["otherwise"] == "refuse":
        raise BadSample("missing_text", f"no text of {policy['least']} to {policy['most']} words")
    away = [max(policy["least"] - count, count - policy["most"]) for count in words]
    return texts[away.index(min(away))]


def _sentences(
    fields: dict[str, Any],
    values: list[Any],
    policy: dict[str, Any],
    max_text: int,
    generator: np.random.Generator,
) -> list[str | None]:
    first: list[str | None] = []
    if policy["raw"]:
        raw = _optional(fields, policy["raw"])
        if not raw:
            raise BadSample("missing_text", f"field {policy['raw']}")
        first = [clean_text(raw[0], max_text)]
    parts = [part for value in values for part in sentences(clean_text(value, max_text), policy["split"])]
    merge, k = policy["merge"], policy["k"]
    joined = [" ".join(parts[i : i + merge]) for i in range(max(1, len(parts) - merge + 1))] if parts else []
    if not joined:
        if not first:
            raise BadSample("missing_text", "no sentence")
        return first + [None] * k
    if policy["replacement"] == "always" or (policy["replacement"] == "when-short" and len(joined) < k):
        chosen = generator.integers(len(joined), size=k).tolist()
    else:
        chosen = generator.permutation(len(joined))[:k].tolist()
    drawn: list[str | None] = [joined[i] for i in chosen]
    return first + drawn + [None] * (k - len(drawn))
