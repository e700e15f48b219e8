"""VocabularyLayout: who owns which ids.

Text, special tokens, image codes and groups of either are named spans of one id range. Masks, heads, decoding and
surgery ask the layout, so that nobody computes `id - V_text` by hand. Stretched by: liquid, lavit, elm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Ids start..stop-1."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class VocabularyLayout:
    """Disjoint spans that cover 0..size-1, and the named single ids among them.

    Raises ValueError when spans overlap, leave a gap, or a special id lies outside.
    """

    spans: dict[str, Span]
    special: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = 0
        for name, span in sorted(self.spans.items(), key=lambda item: item[1].start):
            if span.start != expected or span.stop < span.start:
                raise ValueError(f"vocabulary span {name!r} is {span.start}..{span.stop}, expected to begin at {expected}")
            expected = span.stop
        for name, token in self.special.items():
            if not 0 <= token < expected:
                raise ValueError(f"special token {name!r} has id {token}, outside 0..{expected - 1}")

    @classmethod
    def of_text(cls, size: int, special: dict[str, int] | None = None) -> VocabularyLayout:
        """A plain text vocabulary of `size` ids."""
        return cls({"text": Span(0, size)}, dict(special or {}))

    @property
    def size(self) -> int:
        return max((span.stop for span in self.spans.values()), default=0)

    def extend(self, name: str, count: int) -> VocabularyLayout:
        """The layout with `count` new ids at the end, called `name`."""
        if name in self.spans:
            raise ValueError(f"the vocabulary already has a span {name!r}")
        return VocabularyLayout({**self.spans, name: Span(self.size, self.size + count)}, self.special)

    def owner(self, token: int) -> str:
        """The name of the span that holds an id."""
        for name, span in self.spans.items():
            if span.start <= token < span.stop:
                return name
        raise ValueError(f"id {token} is outside the vocabulary of {self.size}")

    def allowed(self, *names: str, special: tuple[str, ...] = (), device: Any = None) -> Tensor:
        """[size] bool: ids of the spans `names` and the special tokens `special`, for masking logits."""
        out = torch.zeros(self.size, dtype=torch.bool, device=device)
        for name in names:
            out[self.spans[name].start : self.spans[name].stop] = True
        for name in special:
            out[self.special[name]] = True
        return out

    def to_local(self, ids: Tensor, name: str) -> Tensor:
        """Ids of a span as 0..len(span)-1 (image codes for their decoder)."""
        return ids - self.spans[name].start

    def from_local(self, local: Tensor, name: str) -> Tensor:
        """The inverse of `to_local`."""
        return local + self.spans[name].start
