"""Parts of a source by a hash of a field, so that samples of one concept are never on both sides.

The parts hold places in the source, not copies: readers, workers and shards stay the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlm.config.errors import DataError
from vlm.data.mixture import Mixture
from vlm.data.options import DataOptions
from vlm.data.samples import BadSample, Sample, field_at, group_id
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.evaluation.reading import EvaluationData, Reading
from vlm.runtime.pictures import DEFAULT_LIMITS, BadPicture, PictureLimits
from vlm.types.random import draw_key

PURPOSE = "dev-part"


@dataclass(frozen=True)
class Carving:
    """by: fields, of which a sample's first decides; share: of the values that are held out; held_out: that part, or the rest."""

    by: tuple[str, ...]
    share: float
    held_out: bool

    def of(self, source: Source, limits: PictureLimits = DEFAULT_LIMITS) -> Source:
        """This part of a source, of each source of a mixture. Raises DataError when it would be empty."""
        if isinstance(source, Mixture):
            return source.cut(lambda part: self.of(part, limits))
        inside = held_out(source, self.by, self.share, limits)
        chosen = np.flatnonzero(inside if self.held_out else ~inside)
        if not len(chosen):
            name = "held-out part" if self.held_out else "rest"
            raise DataError(
                f"the {name} of {len(source)} samples is empty (share {self.share:g} of the values of {' or '.join(self.by)})",
                remedy="name another field in claim.tune.by, or another share in claim.tune.dev",
            )
        return Subset(source, chosen)


def is_held_out(value: Any, share: float) -> bool:
    """Whether a value belongs to the held-out part: by its hash alone, case, width and spacing aside."""
    return draw_key(0, PURPOSE, group_id(value)) < share * 2**63


def held_out(
    source: Source, by: Sequence[str], share: float, limits: PictureLimits = DEFAULT_LIMITS
) -> np.ndarray:
    """[n] bool: the samples whose value is held out. One that cannot be read is decided by its key."""
    reader = open_reader(source.spec(), limits)
    inside = np.zeros(len(source), bool)
    for index in range(len(source)):
        try:
            fields = reader.fields(source.recipe(index))
        except (BadSample, BadPicture):
            fields = {}
        found = (value for name in by if (value := field_at(fields, name)) is not None)
        inside[index] = is_held_out(next(found, source.key(index)), share)
    return inside


class Subset:
    """Some samples of a source, as a source of its own: same ids, same keys, same reader."""

    def __init__(self, whole: Source, places: np.ndarray) -> None:
        self.whole = whole
        self.places = places
        self.kind = f"a part of {whole.kind}"
        self.ids = whole.ids[places]

    def __len__(self) -> int:
        return len(self.places)

    def key(self, index: int) -> str:
        return self.whole.key(int(self.places[index]))

    def recipe(self, index: int) -> Any:
        return self.whole.recipe(int(self.places[index]))

    def spec(self) -> dict[str, Any]:
        return self.whole.spec()

    def read(self, index: int) -> Sample:
        return self.whole.read(int(self.places[index]))

    def describe(self) -> Mapping[str, Any]:
        return {**self.whole.describe(), "kind": self.kind, "samples": len(self)}


class CarvedData(EvaluationData):
    """Evaluation data of a part of a source."""

    def __init__(self, uri: str, carving: Carving, reading: Reading | None = None) -> None:
        super().__init__(uri, reading)
        self.uri = f"{uri} ({'held-out' if carving.held_out else 'remaining'} part)"
        self.source = carving.of(self.source, self.reading.limits)


def evaluation_data(uri: str, data: DataOptions, carving: Carving | None) -> EvaluationData:
    """The data at an address, or a part of them, read with the columns and caps of a `[data]` table."""
    reading = Reading.of(data)
    return EvaluationData(uri, reading) if carving is None else CarvedData(uri, carving, reading)
