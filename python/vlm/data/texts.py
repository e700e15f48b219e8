"""The texts of a source, for training a tokenizer or counting words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from vlm.data.captions import text_values
from vlm.data.mixture import Mixture
from vlm.data.options import DataOptions
from vlm.data.samples import BadSample, Sample, clean_text, field_at
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.data.streams.conversation import asked
from vlm.data.streams.messages import messages_of
from vlm.data.streams.options import ConversationStream, Literally
from vlm.runtime.pictures import BadPicture


def texts_of(sample: Sample, options: DataOptions) -> Iterator[str]:
    """The usable texts of a sample: all that its conversations may say, or, without conversations, every entry of its
    text column and of the columns that captions are made from."""
    policy = options.captions
    values = []
    for stream in options.conversations.values():
        with suppress(BadSample):
            values += _said(sample, stream, options)
    if options.conversations:
        yield from _usable(values, options)
        return
    with suppress(BadSample):  # the loader counts and names it
        values += text_values(sample.fields, options.columns.text)
    if policy.kind in ("random", "sentences", "mix", "length"):
        names = [*policy.columns, *([policy.raw] if policy.kind == "sentences" and policy.raw else [])]
        for name in names:
            value = field_at(sample.fields, name)
            values += value if isinstance(value, list) else [value]
    yield from _usable(values, options)


def _usable(values: list[Any], options: DataOptions) -> Iterator[str]:
    for value in dict.fromkeys(v for v in values if isinstance(v, str)):
        try:
            yield clean_text(value, options.max_text)
        except BadSample:
            continue


def _said(sample: Sample, stream: ConversationStream, options: DataOptions) -> list[Any]:
    """Every text that a conversation stream may take from a sample."""
    fields, names = sample.fields, options.column_names
    if (questions := stream.questions_table) is not None:
        column = names.get(questions.column, questions.column)
        return [text for _, *texts in asked(fields, column, questions.kinds) for text in texts]
    if (regions := stream.regions_table) is not None:
        return [regions.prompt]
    answer = stream.answer_table
    if answer is None:
        column = stream.messages or "auto"
        messages, _, _ = messages_of(fields, names.get(column, column), options.max_text)
        return [part for message in messages for part in message.content if isinstance(part, str)]
    out: list[Any] = []
    if isinstance(stream.prompt, Literally):
        out += [stream.prompt.literal] if isinstance(stream.prompt.literal, str) else stream.prompt.literal
    for column in stream.columns:
        if column == "auto":
            out += text_values(fields, names["text"])
        else:
            value = field_at(fields, names.get(column, column))
            out += value if isinstance(value, list) else [value]
    return out


def source_texts(source: Source, options: DataOptions, limit: int | None = None) -> Iterator[str]:
    """The texts of at most `limit` samples, evenly spread over the source in its own order; bad ones are passed over.

    Pictures are neither read nor decoded. Of a mixture, each source gives its share of the limit.
    """
    if isinstance(source, Mixture):
        total = sum(source.quotas)
        for part, own, quota in zip(source.sources, source.options, source.quotas):
            yield from source_texts(part, own, None if limit is None else max(1, limit * quota // total))
        return
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
