"""The texts of a source, for training a tokenizer or counting words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

from vlm.data.captions import text_values
from vlm.data.options import DataOptions
from vlm.data.samples import BadSample, Sample, clean_text, field_at
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.runtime.pictures import BadPicture


def texts_of(sample: Sample, options: DataOptions) -> Iterator[str]:
    """The usable texts of a sample: every entry of its text column and of the columns that captions are made from."""
    policy = options.captions
    values = []
    with suppress(BadSample):  # the loader counts and names it
        values += text_values(sample.fields, options.columns.text)
    if policy.kind != "one":
        names = [*policy.columns, *([policy.raw] if policy.kind == "sentences" and policy.raw else [])]
        for name in names:
            value = field_at(sample.fields, name)
            values += value if isinstance(value, list) else [value]
    for value in dict.fromkeys(v for v in values if isinstance(v, str)):
        try:
            yield clean_text(value, options.max_text)
        except BadSample:
            continue


def source_texts(source: Source, options: DataOptions, limit: int | None = None) -> Iterator[str]:
    """The texts of at most `limit` samples, evenly spread over the source in its own order; bad ones are passed over.

    Pictures are neither read nor decoded.
    """
    reader = open_reader(source.spec(), options.limits)
    step = 1 if limit is None else max(1, -(-len(source) // limit))
    for index in range(0, len(source), step):
        try:
            fields = reader.fields(source.recipe(index))
        except (BadSample, BadPicture):
            continue
        yield from texts_of(Sample("", fields), options)


def field_values(source: Source, options: DataOptions, path: str) -> list[str]:
    """The distinct values of a field over a whole source, as text, sorted."""
    reader = open_reader(source.spec(), options.limits)
    found: set[str] = set()
    for index in range(len(source)):
        try:
            value = field_at(reader.fields(source.recipe(index)), path)
        except (BadSample, BadPicture):
            continue
        if isinstance(value, str | int | float):
            found.add(str(value))
    return sorted(found)
