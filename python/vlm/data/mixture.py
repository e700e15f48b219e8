"""Several sources as one, in exact shares, and samples kept by a field.

The endless stream is cut into blocks. Each block holds a fixed number of places for each source, shuffled by a key; so
what stands at a position is computed without walking, whatever the rank, and each source runs through its own epochs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase
from math import gcd
from typing import Any

import numpy as np

from vlm.config.errors import DataError
from vlm.data.ledger import Ledger, MixedLedger
from vlm.data.options import DataOptions
from vlm.data.order import EpochOrder
from vlm.data.samples import BadSample, Sample, distinct, field_at, stable_id
from vlm.data.sources.base import Source
from vlm.data.sources.readers import open_reader
from vlm.data.sources.uri import open_source
from vlm.runtime.pictures import BadPicture, PictureLimits
from vlm.types.random import draw_key, generator
from vlm.types.state import Tree

_PRECISION = 10_000
_SHORTEST = 64
"""A block has at least so many places, so that sources do not simply alternate."""


class PartOfSource:
    """Some samples of a source, by their places, as a source of its own: same ids, same keys, same reader."""

    def __init__(self, source: Source, places: np.ndarray) -> None:
        self.source, self.kind = source, source.kind
        self._kept = places
        self.ids = source.ids[places]

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, index: int) -> str:
        return self.source.key(int(self._kept[index]))

    def recipe(self, index: int) -> Any:
        return self.source.recipe(int(self._kept[index]))

    def spec(self) -> dict[str, Any]:
        return self.source.spec()

    def read(self, index: int) -> Sample:
        return self.source.read(int(self._kept[index]))

    def describe(self) -> Mapping[str, Any]:
        return {**self.source.describe(), "samples": len(self), "of": len(self.source)}


def fitting(source: Source, where: Mapping[str, str | Sequence[str]], limits: PictureLimits) -> PartOfSource:
    """The samples that a table of patterns keeps. One that cannot be read is kept, so that it is counted."""
    reader = open_reader(source.spec(), limits)
    kept: list[int] = []
    for index in range(len(source)):
        try:
            fields = reader.fields(source.recipe(index))
        except (BadSample, BadPicture):
            kept.append(index)
            continue
        if all(_fits(field_at(fields, path), patterns) for path, patterns in where.items()):
            kept.append(index)
    if not kept:
        asked = ", ".join(f"{name} = {patterns!r}" for name, patterns in where.items())
        raise DataError(f"none of the {len(source)} samples has {asked}", where="data.where", remedy="see `vlm data inspect`")
    return PartOfSource(source, np.asarray(kept, np.int64))


def without(source: Source, keys: Collection[str]) -> PartOfSource:
    """The samples whose keys are not among these. Raises DataError when none is left."""
    kept = [index for index in range(len(source)) if source.key(index) not in keys]
    if not kept:
        raise DataError(f"all of the {len(source)} samples are excluded", where="data.exclude")
    return PartOfSource(source, np.asarray(kept, np.int64))


def excluded_keys(path: str) -> frozenset[str]:
    """The keys that a file names, one a line, or JSON lines with `key` as `vlm data overlap` writes them. Raises DataError."""
    keys = set()
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.strip()
                key = json.loads(line).get("key") if line.startswith("{") else line
                if not isinstance(key, str):
                    raise DataError("the line has no key", where=f"{path}:{number}", remedy="one key a line, or JSON with key")
                if key:
                    keys.add(key)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path, remedy="data.exclude names a file of keys") from error
    except ValueError as error:
        raise DataError(f"cannot be read: {error}", where=path, remedy="one key a line, or JSON with key") from error
    return frozenset(keys)


def _fits(value: Any, patterns: str | Sequence[str]) -> bool:
    values = value if isinstance(value, list) else [value]
    known = [patterns] if isinstance(patterns, str) else patterns
    texts = [str(v) for v in values if isinstance(v, str | int | float)]
    return any(fnmatchcase(text, pattern) for text in texts for pattern in known)


class Mixture:
    """The sources of `[data.mixture]` one after another; `order` says how they are mixed.

    Keys and quarantine name the source first: `NAME/shard:key`.
    """

    kind = "mixture"

    def __init__(self, options: DataOptions) -> None:
        """Opens every source. Raises DataError that names the one that cannot be opened."""
        self.names = list(options.mixture)
        self.options = [options.of_part(name) for name in self.names]
        self.sources = [open_filtered(part.source, part, train=True, name=name) for name, part in zip(self.names, self.options)]
        self.quotas = quotas([float(options.shares[name]) for name in self.names])
        self._first = np.cumsum([0] + [len(source) for source in self.sources])
        ids = [np.asarray([stable_id(name, str(i)) for i in s.ids.tolist()], np.int64) for name, s in zip(self.names, self.sources)]
        self.ids = distinct(np.concatenate(ids))

    def cut(self, part_of: Callable[[Source], Source]) -> Mixture:
        """The same mixture, in the same shares, of a part of each source: what `part_of` leaves of it."""
        out = copy(self)
        kept = [part_of(source) for source in self.sources]
        chosen = [self.start(i) + part.places for i, part in enumerate(kept)]  # type: ignore[attr-defined]
        out.sources, out.ids = kept, self.ids[np.concatenate(chosen)]
        out._first = np.cumsum([0] + [len(source) for source in kept])
        return out

    def __len__(self) -> int:
        return int(self._first[-1])

    def place(self, index: int) -> tuple[int, int]:
        """(number of the source, index there)."""
        part = int(np.searchsorted(self._first, index, side="right")) - 1
        return part, index - int(self._first[part])

    def start(self, part: int) -> int:
        """The index of a source's first sample."""
        return int(self._first[part])

    def key(self, index: int) -> str:
        part, own = self.place(index)
        return f"{self.names[part]}/{self.sources[part].key(own)}"

    def recipe(self, index: int) -> Any:
        part, own = self.place(index)
        return [part, self.sources[part].recipe(own)]

    def spec(self) -> dict[str, Any]:
        return {"kind": "mixture", "parts": [source.spec() for source in self.sources]}

    def read(self, index: int) -> Sample:
        part, own = self.place(index)
        return Sample(self.key(index), self.sources[part].read(own).fields)

    def describe(self) -> Mapping[str, Any]:
        total = sum(self.quotas)
        shares = {name: round(quota / total, 4) for name, quota in zip(self.names, self.quotas)}
        return {"kind": self.kind, "samples": len(self), "shares": shares}


def quotas(shares: Sequence[float]) -> list[int]:
    """Places of each source in a block: the shares to four digits, at least one place, in lowest terms or a multiple."""
    counts = [max(1, round(share * _PRECISION)) for share in shares]
    common = gcd(*counts)
    counts = [count // common for count in counts]
    times = -(-_SHORTEST // sum(counts))
    return [count * times for count in counts]


class MixedOrder(EpochOrder):
    """Positions of the endless stream to (epoch of the source, index in the mixture)."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        super().__init__(mixture.ids, seed)
        self.mixture = mixture
        self._parts = [
            EpochOrder(mixture.ids[mixture.start(i) : mixture.start(i + 1)], draw_key(seed, "mixture", name))
            for i, name in enumerate(mixture.names)
        ]
        self._length = sum(mixture.quotas)
        self._block: tuple[int, np.ndarray, np.ndarray] | None = None

    def at(self, position: int) -> tuple[int, int]:
        block, place = divmod(position, self._length)
        if self._block is None or self._block[0] != block:
            self._block = (block, *self._laid(block))
        part, rank = int(self._block[1][place]), int(self._block[2][place])
        epoch, own = self._parts[part].at(block * self.mixture.quotas[part] + rank)
        return epoch, self.mixture.start(part) + own

    def _laid(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(source, how many of that source stand before in the block) of each place."""
        parts = np.repeat(np.arange(len(self.mixture.quotas)), self.mixture.quotas)
        parts = parts[generator(self.seed, "mixture", "block", block).permutation(self._length)]
        ranks = np.empty(self._length, np.int64)
        for part, quota in enumerate(self.mixture.quotas):
            ranks[parts == part] = np.arange(quota)
        return parts, ranks

    def identity(self) -> Tree:
        """The mixture belongs to it: names, shares and the samples of each source."""
        own = super().identity()
        shares = stable_id(*(f"{n}={q}" for n, q in zip(self.mixture.names, self.mixture.quotas)))
        return {**own, "fingerprint": (int(own["fingerprint"]) ^ shares) >> 1}


def order_of(source: Source, seed: int) -> EpochOrder:
    return MixedOrder(source, seed) if isinstance(source, Mixture) else EpochOrder(source.ids, seed)


def parts_of(source: Source, options: DataOptions) -> list[tuple[Source, DataOptions]]:
    """The sources of a mixture with their tables, or the one source with its own."""
    return list(zip(source.sources, source.options)) if isinstance(source, Mixture) else [(source, options)]


def part_of(source: Source, index: int) -> int:
    """The number of the source that a sample is from; 0 without a mixture."""
    return source.place(index)[0] if isinstance(source, Mixture) else 0


def ledger_of(source: Source, options: DataOptions) -> Ledger | MixedLedger:
    """The account of a source, or of each source of a mixture."""
    if isinstance(source, Mixture):
        return MixedLedger(source.names, [len(part) for part in source.sources], options.bad_samples)
    return Ledger(len(source), options.bad_samples)


def open_filtered(uri: str, options: DataOptions, *, train: bool, name: str | None = None) -> Source:
    """A source without what `where` does not fit and, of training data, what `exclude` names. name: in a mixture, whose keys it leads."""
    source = open_source(uri, options.limits)
    source = fitting(source, options.where, options.limits) if options.where else source
    if not train or options.exclude is None:
        return source
    keys = excluded_keys(options.exclude)
    if name is not None:
        keys = frozenset(key.removeprefix(f"{name}/") for key in keys)
    left = without(source, keys)
    if name is None and keys and len(left) == len(source):
        raise DataError(
            f"none of its {len(keys)} keys is in the training data", where=options.exclude, remedy="keys are those that vlm data inspect shows",
        )  # fmt: skip
    return left
