"""Outputs, Request and Views: what a model returns, what is asked of it, and how objectives see it.

A request is written `companion/stream[@context].field[:layer]`, for example `model/image.embedding`,
`teacher/text.tokens`, `reference/answer.preferred@image.noisy.vocabulary`: the companion ends at the first slash, the
field begins after the last dot, the context (the picture stream with which a text is read) after the at sign. Hidden
states are asked for by layer: `model/image.hidden:4`. A model computes only what is asked of it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from vlm.types.layout import Layout

FIELDS = ("embedding", "tokens", "vocabulary", "logits", "hidden", "statistics")
"""What may be asked of a model, stream by stream."""


@dataclass(frozen=True)
class Vocabulary:
    """The two factors of vocabulary logits, for fused operators: logits = hidden weight^T + bias.

    hidden [n, T, C]; weight [V, C]; bias [V] or None; softcap: cap * tanh(logit / cap), 0 for none.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0

    def logits(self) -> Tensor:
        """[n, T, V], materialised: for decoding, evaluation and the plain twin."""
        out = self.hidden @ self.weight.T
        if self.bias is not None:
            out = out + self.bias
        return self.softcap * (out / self.softcap).tanh() if self.softcap else out


@dataclass(frozen=True)
class Outputs:
    """What a model says of one stream. Only the fields that were asked for are set.

    sample_index [n]; mask [n], rows that are valid.
    embedding [n, E], pooled and projected, not normalised.
    tokens [n, N, E], projected into the embedding's space, with token_mask [n, N].
    vocabulary: factors of the vocabulary logits; logits [n, ...]: class or answer logits.
    hidden: layer -> [n, N, C]. statistics: name -> tensor (attention received, keep ratios, ...).
    auxiliary: name -> scalar tensor that a loss may add (expert balance, keep-ratio terms).
    scale, bias: the model's own learned temperature (already exponentiated is `scale`; `log_scale` is its logarithm).
    layout: positions of tokens and vocabulary after any dropping, merging or packing; layouts: those of hidden
    states where they differ, by layer (`layout_of` answers for both).
    """

    sample_index: Tensor
    mask: Tensor
    embedding: Tensor | None = None
    tokens: Tensor | None = None
    token_mask: Tensor | None = None
    vocabulary: Vocabulary | None = None
    logits: Tensor | None = None
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    log_scale: Tensor | None = None
    bias: Tensor | None = None
    layout: Layout | None = None
    layouts: Mapping[int, Layout] = field(default_factory=dict)

    def layout_of(self, layer: int) -> Layout | None:
        """The layout of the hidden states of a layer."""
        return self.layouts.get(layer, self.layout)


@dataclass(frozen=True)
class Request:
    """One thing that an objective or evaluator needs. context: the picture stream with which a text is read, None for
    what the model takes by itself."""

    companion: str
    stream: str
    field: str
    layer: int | None = None
    context: str | None = None

    @classmethod
    def parse(cls, text: str) -> Request:
        """From `companion/stream[@context].field[:layer]`. Raises ValueError that says what was expected."""
        companion, slash, rest = text.partition("/")
        key, dot, name = rest.rpartition(".")
        name, colon, layer = name.partition(":")
        if not (slash and dot and companion) or name not in FIELDS:
            raise ValueError(f"{text!r} is no request: expected companion/stream[@context].field, field one of {', '.join(FIELDS)}")
        if bool(colon) != (name == "hidden"):
            raise ValueError(f"{text!r}: hidden states are asked for by layer, hidden:4, and nothing else is")
        if colon and not layer.isdecimal():
            raise ValueError(f"{text!r}: {layer!r} is no number of a layer")
        try:
            stream, context = split_key(key)
        except ValueError as error:
            raise ValueError(f"{text!r} is no request: {error}") from None
        return cls(companion, stream, name, int(layer) if colon else None, context)

    @property
    def key(self) -> str:
        """`stream[@context]`: how the model is asked and its answer is named."""
        return self.stream if self.context is None else f"{self.stream}@{self.context}"

    @property
    def view(self) -> str:
        """`companion/stream[@context]`: the key of its outputs in the views."""
        return f"{self.companion}/{self.key}"

    @property
    def wanted(self) -> str:
        """The field as a model is asked for it: `vocabulary`, `hidden:4`."""
        return self.field if self.layer is None else f"{self.field}:{self.layer}"

    def __str__(self) -> str:
        return f"{self.view}.{self.wanted}"

    def __lt__(self, other: Request) -> bool:
        return self._order() < other._order()

    def _order(self) -> tuple[str, str, str, str, int]:
        return self.companion, self.stream, self.context or "", self.field, -1 if self.layer is None else self.layer


Wanted = Mapping[str, frozenset[str]]
"""stream[@context] -> fields (`hidden:4` included), what one model is asked for in one call."""


def split_key(key: str) -> tuple[str, str | None]:
    """`text@image.noisy` -> ("text", "image.noisy"); a plain stream has the context None. Raises ValueError for no stream."""
    stream, at, context = key.partition("@")
    if not stream or (at and not context) or "@" in context:
        raise ValueError(f"{key!r} names no stream: expected stream or stream@context")
    return stream, context or None


def wanted_of(requests: Iterable[Request], companion: str) -> dict[str, frozenset[str]]:
    """The requests to one companion, stream by stream."""
    out: dict[str, set[str]] = {}
    for request in requests:
        if request.companion == companion:
            out.setdefault(request.key, set()).add(request.wanted)
    return {key: frozenset(names) for key, names in out.items()}


def layers_of(fields: Collection[str]) -> set[int]:
    """The layers asked for in a set of fields: {"embedding", "hidden:4"} -> {4}."""
    return {int(name.partition(":")[2]) for name in fields if name.startswith("hidden:")}


class Views(dict[str, Outputs]):
    """Outputs keyed by `companion/stream[@context]`, as an objective sees them."""

    def __missing__(self, key: str) -> Outputs:
        known = ", ".join(sorted(self)) or "none"
        raise KeyError(f"no view {key!r} (there are: {known}); an objective must name what it reads in `requires`")
