"""Batch: what the data hands to the models.

A batch holds B samples as named streams (`image`, `text`, `region`, `image.noisy`, `answer.rejected`, ...). A stream
holds n rows; `sample_index` says which sample each row belongs to, so K captions, views, tiles, frames, points and
ragged regions are rows, not special cases. Rows of one role are rows of one stream, numbered by `slot` (K captions);
rows with different roles are different streams (`answer.preferred`, `answer.rejected`). A value of zero never means
padding: `mask` does.

Shapes: B samples, n rows of a stream, T positions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import IntEnum
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """Rows of one kind of value.

    values: [n, ...]; mask: bool, [n] or [n, T], true where valid; sample_index: [n] int64 in [0, B).
    slot: [n] int64, which of a sample's interchangeable rows this is; None where each sample has one row.
    Raises ValueError when the leading sizes differ or the mask is not boolean.
    """

    values: Tensor
    mask: Tensor
    sample_index: Tensor
    slot: Tensor | None = None
    value_dims: ClassVar[int | None] = None
    mask_dims: ClassVar[int] = 1

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.value_dims is not None and self.values.dim() != self.value_dims:
            raise ValueError(f"{name}.values has {self.values.dim()} dimensions, expected {self.value_dims}")
        if self.mask.dtype != torch.bool:
            raise ValueError(f"{name}.mask is {self.mask.dtype}, expected torch.bool (true = valid)")
        if self.mask.shape != self.values.shape[: self.mask.dim()] or self.mask.dim() < self.mask_dims:
            raise ValueError(f"{name}.mask is {tuple(self.mask.shape)} beside values {tuple(self.values.shape)}")
        if self.sample_index.shape != self.values.shape[:1]:
            raise ValueError(f"{name}.sample_index is {tuple(self.sample_index.shape)}, expected [{len(self)}]")

    def __len__(self) -> int:
        return self.values.shape[0]

    def map(self, function: Callable[[Tensor], Tensor]) -> Stream:
        """The stream with `function` applied to each of its tensors; None stays None."""
        changed = {f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **changed)

    def rows(self, chosen: Tensor) -> Stream:
        """The rows `chosen` ([m] int64 or [n] bool) with every per-row tensor indexed alike."""
        return self.map(lambda tensor: tensor[chosen])


@dataclass(frozen=True)
class Pictures(Stream):
    """values [n, 3, H, W], uint8 in 0..255 or float in 0..1 (not yet normalised); mask [n].

    place: [n, 3] int64 (frame, tile row, tile column), or None where each sample has one whole picture.
    masked: [n, g, g] bool, squares of a grid over the picture that a model must not see (values hold them still), or None.
    """

    place: Tensor | None = None
    masked: Tensor | None = None
    value_dims: ClassVar[int | None] = 4


class Role(IntEnum):
    """Which part of a sample a token is from. TAG: text that announces the tile of the next placeholder."""

    CONTEXT = 0
    INSTRUCTION = 1
    ANSWER = 2
    LEARNED = 3
    TAG = 4


@dataclass(frozen=True)
class TokenIds(Stream):
    """values [n, T] int64; mask [n, T].

    segment: [n, T] int64, document number within a packed row, -1 at padding; None: one document a row.
    position: [n, T] int64; None: 0..T-1 counted over valid tokens.
    supervised: [n, T] bool, true where the token is a prediction target; None: all valid tokens.
    target: [n, T] int64, what a position should be where that is not its own id (masked tokens); None: the ids.
    role: [n, T] int64 of `Role`; None: all context.
    triples, triple_mask: [n, K, 3, L] ids and validity of head, relation and tail of what each text says (its scene graph); None: not
    looked at.
    """

    segment: Tensor | None = None
    position: Tensor | None = None
    supervised: Tensor | None = None
    target: Tensor | None = None
    role: Tensor | None = None
    triples: Tensor | None = None
    triple_mask: Tensor | None = None
    value_dims: ClassVar[int | None] = 2
    mask_dims: ClassVar[int] = 2


@dataclass(frozen=True)
class Boxes(Stream):
    """values [n, 4] float, (x0, y0, x1, y1) as shares of width and height; mask [n]."""

    value_dims: ClassVar[int | None] = 2


@dataclass(frozen=True)
class Features(Stream):
    """values [n, C] or [n, T, C] float (cached embeddings, teacher outputs); mask [n] or [n, T]."""


@dataclass(frozen=True)
class Labels(Stream):
    """values [n] int64 (class, group, concept) or [n] float (score); mask [n]."""

    value_dims: ClassVar[int | None] = 1


@dataclass(frozen=True)
class Batch:
    """B samples as streams.

    keys: one name a sample (`shard:key`), which logs and errors print.
    draws: [B] int64, a stable id of each sample: randomness is keyed by (seed, purpose, draw, epoch).
    epoch: how often the data has been passed, one number a sample, [B] int64.
    shared: streams whose rows belong to the run, not to samples (class names, descriptors): `sample_index` counts
    the owner (the class), `slot` the descriptor. Cutting a batch keeps them whole.
    extra: plain values a sample (raw caption, fields), for evaluation.
    """

    streams: Mapping[str, Stream]
    keys: Sequence[str]
    draws: Tensor
    epoch: Tensor
    extra: Mapping[str, Sequence[object]] = field(default_factory=dict)
    shared: Mapping[str, Stream] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not (len(self.keys) == len(self.draws) == len(self.epoch)):
            raise ValueError("Batch: keys, draws and epoch must have one entry a sample")

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, name: str) -> bool:
        return name in self.streams or name in self.shared

    def __iter__(self) -> Iterator[str]:
        return iter(self.streams)

    def __getitem__(self, name: str) -> Stream:
        stream = self.streams.get(name, self.shared.get(name))
        if stream is None:
            known = ", ".join(sorted([*self.streams, *self.shared])) or "none"
            raise KeyError(f"the batch has no stream {name!r} (it has: {known})")
        return stream

    def with_streams(self, added: Mapping[str, Stream]) -> Batch:
        """The batch with streams added or replaced."""
        return replace(self, streams={**self.streams, **added})

    def to(self, device: torch.device | str) -> Batch:
        """The batch with every tensor on `device`."""
        moved = {name: stream.map(lambda t: t.to(device)) for name, stream in self.streams.items()}
        shared = {name: stream.map(lambda t: t.to(device)) for name, stream in self.shared.items()}
        return replace(self, streams=moved, shared=shared, draws=self.draws.to(device), epoch=self.epoch.to(device))

    def samples(self, start: int, stop: int) -> Batch:
        """Samples start..stop-1, their rows in the old order, sample_index counted from 0; shared streams whole."""
        part = {}
        for name, stream in self.streams.items():
            chosen = (stream.sample_index >= start) & (stream.sample_index < stop)
            kept = stream.rows(chosen)
            part[name] = replace(kept, sample_index=kept.sample_index - start)
        return replace(
            self,
            streams=part,
            keys=self.keys[start:stop],
            draws=self.draws[start:stop],
            epoch=self.epoch[start:stop],
            extra={name: values[start:stop] for name, values in self.extra.items()},
        )

    def split(self, parts: int) -> list[Batch]:
        """`parts` batches of nearly equal size, in order; the first ones take the remainder."""
        base, rest = divmod(len(self), parts)
        sizes = [base + (i < rest) for i in range(parts)]
        starts = [sum(sizes[:i]) for i in range(parts)]
        return [self.samples(start, start + size) for start, size in zip(starts, sizes)]
