"""A few samples of each class: the same ones in every epoch, whoever reads them. Source: coop.

The samples of a class are sorted by a keyed hash of their ids, so k shots are a part of k + 1, and a sample that is taken out of
the data moves no other.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from vlm.config.errors import DataError
from vlm.data.mixture import PartOfSource
from vlm.data.options import DataOptions
from vlm.data.samples import BadSample, field_at
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.runtime.pictures import BadPicture
from vlm.types.random import draw_key, mix


def few_shot(source: Source, options: DataOptions, seed: int) -> Source:
    """At most k samples of each class of `options.label`, in the order of the source. seed: where the sampler has none of its own.

    Samples without a class are left out; one that cannot be read is too, because nobody knows its class. Raises DataError when no
    sample has one.
    """
    sampler, label = options.sampler, options.label
    assert sampler is not None
    assert label is not None
    reader = open_reader(source.spec(), options.limits)
    members: dict[str, list[int]] = defaultdict(list)
    for index in range(len(source)):
        try:
            value = field_at(reader.fields(source.recipe(index)), label)
        except (BadSample, BadPicture):
            continue
        if isinstance(value, str | int | float):
            members[str(value)].append(index)
    if not members:
        raise DataError(f"no sample has the field {label!r}", where="data.label")
    key = draw_key(seed if sampler.seed is None else sampler.seed, "few-shot")
    chosen: list[int] = []
    for own in members.values():
        places = np.asarray(own, np.int64)
        chosen += places[np.argsort(mix(source.ids[places], key), kind="stable")[: sampler.k]].tolist()
    return PartOfSource(source, np.asarray(sorted(chosen), np.int64))
