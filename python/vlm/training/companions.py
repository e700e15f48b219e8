"""Companions: every other model of a run, with its source, update rule and cache."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from vlm.config.options import Options
from vlm.data.embedding_cache import EmbeddingCache
from vlm.models import Model, load_model
from vlm.types import Batch, Outputs, Request, Views
from vlm.types.outputs import Wanted, wanted_of
from vlm.types.state import Tree


class EmaUpdate(Options):
    """theta_m <- decay theta_m + (1 - decay) theta after every update."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.999, ge=0, le=1)


class CompanionOptions(Options):
    """One table [companions.NAME]."""

    source: str = Field(description='a model directory, or "model" for a copy of the model at the start of the stage')
    update: EmaUpdate | None = Field(None, description="how it follows the model; none: frozen")
    cache: bool = Field(False, description="keep its embeddings on disk, keyed by its weights and the sample; needs unaugmented data")


@dataclass
class Companion:
    """A companion model in evaluation mode, without gradients."""

    name: str
    model: Model
    update: EmaUpdate | None
    cache: EmbeddingCache | None = None
    copied: bool = False

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Its outputs; embeddings come from the cache where every sample of the batch has one."""
        if self.cache is None or any(fields != {"embedding"} for fields in wanted.values()):
            return self.model.encode(batch, wanted)
        out = {}
        for stream, fields in wanted.items():
            rows = batch[stream]
            known = self.cache.get(stream, batch.draws[rows.sample_index])
            if known is None:
                fresh = self.model.encode(batch, {stream: fields})[stream]
                assert fresh.embedding is not None
                self.cache.put(stream, batch.draws[rows.sample_index], fresh.embedding)
                out[stream] = fresh
            else:
                mask = rows.mask if rows.mask.dim() == 1 else rows.mask.any(1)
                out[stream] = Outputs(rows.sample_index, mask, embedding=known)
        return out


class Companions:
    """All companions of a stage."""

    def __init__(self, members: Sequence[Companion] = ()) -> None:
        self.members = {member.name: member for member in members}
        for member in members:
            member.model.eval().requires_grad_(False)

    @classmethod
    def build(cls, options: Mapping[str, CompanionOptions], model: Model, cache_folder: Path | None) -> Companions:
        """Load or copy each. Raises CheckpointError for a source that cannot be read."""
        members = []
        for name, table in options.items():
            companion = copy.deepcopy(model) if table.source == "model" else load_model(table.source)
            cache = None
            if table.cache and cache_folder is not None:
                cache = EmbeddingCache.of_model(cache_folder, companion.state_dict())
            members.append(Companion(name, companion, table.update, cache, copied=table.source == "model"))
        return cls(members)

    def models(self) -> dict[str, Model]:
        return {name: member.model for name, member in self.members.items()}

    @torch.no_grad()
    def views(self, batch: Batch, requests: Sequence[Request]) -> Views:
        """Outputs keyed `companion/stream`, only of what is asked."""
        views = Views()
        for name, member in self.members.items():
            wanted = wanted_of(requests, name)
            if wanted:
                for stream, outputs in member.encode(batch, wanted).items():
                    views[f"{name}/{stream}"] = outputs
        return views

    @torch.no_grad()
    def after_step(self, model: Model) -> None:
        """Move those that follow the model."""
        for member in self.members.values():
            if member.update is not None:
                own = dict(model.state_dict())
                for key, tensor in member.model.state_dict().items():
                    if tensor.is_floating_point():
                        tensor.lerp_(own[key].to(tensor), 1 - member.update.decay)

    def flush(self) -> None:
        for member in self.members.values():
            if member.cache is not None:
                member.cache.flush()

    def state_dict(self) -> Tree:
        """Companions that change or were copied from the model: what no path can bring back."""
        return {name: m.model.state_dict() for name, m in self.members.items() if m.update is not None or m.copied}

    def load_state_dict(self, state: Tree) -> None:
        for name, tensors in state.items():
            self.members[name].model.load_state_dict(tensors)
