"""Caption policies: which texts of a sample become which streams."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from vlm.data.samples import BadSample, clean_text, field_at

AUTO_TEXT = ("txt", "caption", "text")
_SENTENCE = re.compile(r"(?<=[.!?。！？])\s+|\n+")


def text_values(fields: dict[str, Any], column: str) -> list[Any]:
    """The texts of a column (a list gives all its entries). Raises BadSample when there is none."""
    for path in AUTO_TEXT if column == "auto" else (column,):
        value = field_at(fields, path)
        if value is not None:
            values = list(value) if isinstance(value, list) else [value]
            if values:
                return values
    raise BadSample(
        "missing_text", "none of " + ", ".join(AUTO_TEXT) if column == "auto" else f"field {column}"
    )


def sentences(text: str) -> list[str]:
    """The sentences of a text, in order."""
    return [part.strip() for part in _SENTENCE.split(text) if part.strip()]


def choose(
    fields: dict[str, Any], column: str, policy: dict[str, Any], max_text: int, key: int
) -> dict[str, str]:
    """stream name -> text under a caption policy (as JSON), drawn from `key`. Raises BadSample."""
    kind = policy["kind"]
    if kind == "one":
        return {"text": clean_text(text_values(fields, column)[0], max_text)}
    generator = np.random.Generator(np.random.Philox(key=key))
    if kind == "random":
        if policy["fields"]:
            values = [v for name in policy["fields"] for v in _optional(fields, name)]
            if not values:
                raise BadSample("missing_text", "none of " + ", ".join(policy["fields"]))
        else:
            values = text_values(fields, column)
        return {"text": clean_text(values[int(generator.integers(len(values)))], max_text)}
    long = clean_text(text_values(fields, policy["field"] or column)[0], max_text)
    parts = sentences(long)
    chosen = sorted(generator.permutation(len(parts))[: policy["k"]].tolist())
    return {"text": long, **{f"caption.{i}": parts[c] for i, c in enumerate(chosen, start=1)}}


def _optional(fields: dict[str, Any], name: str) -> list[Any]:
    value = field_at(fields, name)
    return [] if value is None else list(value) if isinstance(value, list) else [value]
