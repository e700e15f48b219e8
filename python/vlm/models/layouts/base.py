"""A published layout as data: prefixes, inner names, and the few tensors that change shape."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from vlm.config.options import Options
from vlm.types import VocabularyLayout

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu", "silu": "silu"}
"""Our activation name -> the name in a published config."""


def activation_named(name: str) -> str:
    """Our name of a published activation. Raises ValueError for one that we do not have."""
    for ours, theirs in ACTIVATIONS.items():
        if name in (theirs, ours):
            return ours
    raise ValueError(f"activation {name!r} is not supported (known: {', '.join(ACTIVATIONS.values())})")


class PublishedLayout(ABC):
    """One `model_type`.

    prefixes: (ours, theirs) for whole names or beginnings that end in a dot, tried in order.
    inner: (ours, theirs) for what follows `blocks.N.`.
    """

    model_type: str
    architecture: str
    prefixes: tuple[tuple[str, str], ...]
    inner: tuple[tuple[str, str], ...]

    @abstractmethod
    def expresses(self, options: Options) -> bool:
        """Whether a model of these options can be said in this layout."""

    @abstractmethod
    def to_config(self, options: Any, vocabulary: VocabularyLayout) -> dict[str, Any]:
        """config.json of the published form."""

    @abstractmethod
    def from_config(self, config: dict[str, Any]) -> Options:
        """Our options. Raises ValueError naming a field that we cannot honour."""

    def processor_config(self, options: Any) -> dict[str, Any]:
        """processor_config.json of the published form; empty where it has none."""
        return {}

    def reshape_out(self, tensors: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        """Published shapes from ours; keys are published names already."""
        return tensors

    def reshape_in(self, tensors: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        """Our shapes from published ones; keys are published names still."""
        return tensors

    def to_published(self, tensors: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        """Our state dict under published names and shapes."""
        return self.reshape_out({self._renamed(name, 0, 1): t for name, t in tensors.items()}, options)

    def from_published(self, tensors: dict[str, Tensor], options: Any) -> dict[str, Tensor]:
        """A published state dict under our names and shapes. Names that we do not know stay as they are."""
        tensors = {name: t for name, t in tensors.items() if not name.endswith("position_ids")}
        return {self._renamed(name, 1, 0): t for name, t in self.reshape_in(tensors, options).items()}

    def published_name(self, ours: str) -> str:
        """The published name of one of our parameters."""
        return self._renamed(ours, 0, 1)

    def _renamed(self, name: str, source: int, target: int) -> str:
        for pair in self.prefixes:
            old, new = pair[source], pair[target]
            if name == old:
                return new
            if old.endswith(".") and name.startswith(old):
                rest = name[len(old) :]
                number, dot, tail = rest.partition(".")
                if not (dot and number.isdigit()):
                    return new + self._inner_renamed(rest, source, target)
                return f"{new}{number}.{self._inner_renamed(tail, source, target)}"
        return name

    def _inner_renamed(self, name: str, source: int, target: int) -> str:
        for pair in self.inner:
            if name.startswith(pair[source]):
                return pair[target] + name[len(pair[source]) :]
        return name
