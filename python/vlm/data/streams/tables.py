"""What streams need to know of a whole source before the first sample: nouns, and how often each answer occurs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from vlm.data.corruption import nouns_of
from vlm.data.options import DataOptions
from vlm.data.samples import BadSample
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.data.streams.conversation import Conversations, asked
from vlm.runtime.pictures import BadPicture

SAMPLES = 2000
"""Samples that are looked at, spread evenly over the source."""


def stream_tables(source: Source, options: DataOptions) -> dict[str, Any]:
    """`nouns` of the answers that a corruption starts from, `weights` of answers by stream and kind, both as JSON."""
    streams = options.conversations
    corrupted = sorted({s.corruption.of for s in streams.values() if s.corruption is not None})
    balanced = {n: t for n, s in streams.items() if (t := s.questions_table) is not None and t.balance == "answers"}
    answers: dict[str, list[str]] = {name: [] for name in corrupted}
    counts: dict[str, Counter[tuple[str, str]]] = {name: Counter() for name in balanced}
    if corrupted or balanced:
        makers = {n: Conversations({n: streams[n]}, options.column_names, options.max_text) for n in corrupted}
        for fields in _some(source, options):
            for name, maker in makers.items():
                with suppress(BadSample):  # the loader counts and names it
                    answers[name].append(maker.make(fields, {})[name].answer)
            for name, table in balanced.items():
                with suppress(BadSample):
                    column = options.column_names.get(table.column, table.column)
                    counts[name].update((kind, answer) for kind, _, answer in asked(fields, column, table.kinds))
    return {
        "nouns": {name: nouns_of(texts) for name, texts in answers.items()},
        "weights": {name: _weights(count) for name, count in counts.items()},
    }


def _weights(counts: Counter[tuple[str, str]]) -> dict[str, dict[str, float]]:
    """kind -> answer -> 1 / (answers of the kind * how often this one occurs)."""
    kinds = Counter(kind for kind, _ in counts)
    out: dict[str, dict[str, float]] = {}
    for (kind, answer), count in sorted(counts.items()):
        out.setdefault(kind, {})[answer] = 1000.0 / (kinds[kind] * count)
    return out


def _some(source: Source, options: DataOptions) -> Iterator[dict[str, Any]]:
    reader = open_reader(source.spec(), options.limits)
    for index in range(0, len(source), max(1, -(-len(source) // SAMPLES))):
        with suppress(BadSample, BadPicture):
            yield reader.fields(source.recipe(index))
