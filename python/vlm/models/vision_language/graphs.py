"""The graphs of a bundle of this family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.models.graphs import cross_part, decoder_part, embed_part
from vlm.models.language import refuse_chosen_keys
from vlm.models.reduced_graphs import decode_part, prefill_part
from vlm.types.export import ExportPart


class Reader(Protocol):
    """What the graphs read of a model of this family."""

    options: Any
    language: Any
    cross: nn.ModuleDict

    @property
    def picture_tokens(self) -> int: ...

    def visual_tokens(self, pixels: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]: ...


class VisionGraph(nn.Module):
    """pixel_values [n, 3, S, S], normalised, of each tower in order -> visual_tokens [n, K, C], connector included."""

    def __init__(self, model: Reader) -> None:
        super().__init__()
        self.model = model

    def forward(self, *pixel_values: Tensor) -> Tensor:
        tokens, mask = self.model.visual_tokens(dict(zip(self.model.options.towers, pixel_values, strict=True)))
        if mask is not None:
            raise ValueError("a connector that masks visual tokens has no graph")
        return tokens


def export_parts(model: Reader) -> dict[str, ExportPart]:
    """`vision`, `embed`, `decoder`; with cross-attention `cross`; with a reduction `prefill` and `decode` for `decoder`.

    Raises RequestError for one that keeps no fixed number of positions, and for attention to some keys.
    """
    options = model.options
    refuse_chosen_keys(model.language.options)
    if options.tokens is not None and options.tokens.unexportable is not None:
        raise RequestError(
            f"this model has no bundle: {options.tokens.unexportable}", remedy="keep the model directory: every command reads it"
        )
    if not model.language.options.sees_all_before:
        raise RequestError("a model whose language model has attention under a mask or a mixer has no bundle",
                           remedy="keep the model directory: every command reads it")
    inputs = {}
    for name, stream in options.picture_streams().items():
        size = options.towers[name].vit().image_size
        inputs[pixels_of(stream)] = torch.rand(2, 3, size, size)
    dynamic = {name: {0: "batch"} for name in inputs}
    parts = {"vision": ExportPart(VisionGraph(model), inputs, dynamic, ["visual_tokens"]), "embed": embed_part(model.language)}
    counts = drops_of(model)
    if counts:
        assert options.tokens is not None
        renumber = options.tokens.apply.positions == "renumber"
        parts["prefill"] = prefill_part(model.language, counts, options.tokens.score, renumber=renumber)
        parts["decode"] = decode_part(model.language, counts)
        return parts
    blocks: dict[int, Any] = {int(layer): block for layer, block in model.cross.items()}
    if blocks:
        parts["cross"] = cross_part(model.language, blocks, model.picture_tokens)
    return parts | {"decoder": decoder_part(model.language, blocks or None)}


def drops_of(model: Reader) -> dict[int, int]:
    """Layer of the decoder after which fewer visual positions of a picture stay -> how many; empty where all do."""
    tokens = model.options.tokens
    if tokens is None:
        return {}
    counts = tokens.plan(model.language.options.depth).counts(model.picture_tokens)
    before = [model.picture_tokens, *counts.values()]
    return {layer: count for (layer, count), more in zip(counts.items(), before) if count < more}


def pixels_of(stream: str) -> str:
    """The input of the vision graph that a picture stream feeds: pixel_values, pixel_values.NAME."""
    return "pixel_values" + stream.removeprefix("image")
