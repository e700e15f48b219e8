"""Companions: every other model of a run, as objectives meet them, and how they follow the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.data.embedding_cache import EmbeddingCache
from vlm.models import Model
from vlm.training.companion_options import (
    CompanionOptions,
    CompanionUpdate,
    EmaUpdate,
    LiveUpdate,
    ThreeWayUpdate,
)
from vlm.tuning import adapters_off
from vlm.types import Batch, Outputs, Request, Stream, TokenIds, Views
from vlm.types.outputs import Wanted, wanted_of
from vlm.types.state import Tree

__all__ = ["Companion", "CompanionOptions", "Companions", "evaluating"]


@dataclass
class Companion:
    """A companion model in evaluation mode, without gradients.

    copied: it began as a copy of the model. live: `model` is the run's model itself; adapter_off: without its adapters.
    lasting: a copy that is taken once a run. cache_folder: where embeddings are kept, None for nowhere.
    foreign: the directory that it is from, where its tokenizer is another than the run's.
    """

    name: str
    model: Model
    update: CompanionUpdate | None
    cache: EmbeddingCache | None = None
    copied: bool = False
    live: bool = False
    adapter_off: bool = False
    lasting: bool = False
    cache_folder: Path | None = None
    foreign: Path | None = None

    @property
    def stateful(self) -> bool:
        """Whether a checkpoint must hold it: no path can bring its weights back."""
        return not self.live and (self.update is not None or self.copied)

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Its outputs; embeddings come from the cache where every sample of the batch has one."""
        if self.live:
            with evaluating(self.model), adapters_off(self.model) if self.adapter_off else contextlib.nullcontext():
                return self.model.encode(batch, wanted)
        if self.cache is None and self.cache_folder is not None:  # only now are its weights surely those of this run
            self.cache = EmbeddingCache.of_model(self.cache_folder, self.model.state_dict())
        if self.cache is None or not all(_one_embedding(key, fields, batch) for key, fields in wanted.items()):
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

    @torch.no_grad()
    def follow(self, own: Mapping[str, Tensor], third: Mapping[str, Tensor] | None) -> None:
        """Move after an update of the model. own: its state; third: that of the companion which a three-way update names."""
        if self.update is None or isinstance(self.update, LiveUpdate):
            return
        for key, tensor in self.model.state_dict().items():
            if tensor.is_floating_point():
                target = own[key].to(tensor)
                if third is not None:
                    target = torch.lerp(target, third[key].to(tensor), 0.5)
                tensor.lerp_(target, 1 - self.update.decay)


def _one_embedding(key: str, fields: frozenset[str], batch: Batch) -> bool:
    """Whether a cache by sample can answer: the embedding alone is wanted, and no sample has several rows."""
    if fields != {"embedding"} or key not in batch:
        return False
    stream: Stream = batch[key]
    return stream.slot is None and len(stream.sample_index.unique()) == len(stream)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) for the time of the block; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Companions:
    """All companions of a stage."""

    def __init__(self, members: Sequence[Companion] = ()) -> None:
        self.members = {member.name: member for member in members}
        for member in members:
            if not member.live:
                member.model.eval().requires_grad_(False)

    def models(self) -> dict[str, Model]:
        return {name: member.model for name, member in self.members.items()}

    @torch.no_grad()
    def views(
        self, batch: Batch, requests: Sequence[Request], precision: Callable[[], AbstractContextManager[object]] | None = None
    ) -> Views:
        """Outputs keyed `companion/stream[@context]`, only of what is asked.

        precision: in which the model itself computes; live companions share it, so that equal weights give equal numbers.
        The draws of whoever comes after are as if no companion had been run.
        """
        views = Views()
        with torch.random.fork_rng(devices=[]):
            for name, member in self.members.items():
                wanted = wanted_of(requests, name)
                if wanted:
                    with precision() if precision is not None and member.live else contextlib.nullcontext():
                        for key, outputs in member.encode(batch, wanted).items():
                            views[f"{name}/{key}"] = outputs
        return views

    def after_step(self, model: Model) -> None:
        """Move those that follow the model."""
        moving = [member for member in self.members.values() if member.update is not None and not member.live]
        if not moving:
            return
        own = dict(model.state_dict())
        for member in moving:
            third = None
            if isinstance(member.update, ThreeWayUpdate):
                third = dict(self.members[member.update.with_].model.state_dict())
            member.follow(own, third)

    def check(self, model: Model) -> None:
        """Raises RequestError for a companion that cannot follow the model: other parameters, or a third that moves."""
        for member in self.members.values():
            if isinstance(member.update, EmaUpdate | ThreeWayUpdate):
                _same_shapes(member.name, member.model, model, "the model")
            if isinstance(member.update, ThreeWayUpdate):
                third = self.members.get(member.update.with_)
                if third is None or third.live or third.update is not None:
                    raise RequestError(
                        f"companion {member.name!r} moves with {member.update.with_!r}, which is no frozen companion of this stage",
                        remedy=f'add [companions.{member.update.with_}] with source = "model" and no update',
                    )
                _same_shapes(member.name, member.model, third.model, f"companion {third.name!r}")

    def check_texts(self, asked: Mapping[str, Sequence[Request]], batch: Batch) -> None:
        """asked: objective -> its requests. Raises RequestError for a companion that is to read this run's token ids and to
        which they are other words."""
        for objective, requests in asked.items():
            for request in requests:
                member = self.members.get(request.companion)
                if member is not None and member.foreign is not None and isinstance(batch[request.stream], TokenIds):
                    raise RequestError(
                        f"objective {objective!r} asks for {request}, and companion {member.name!r} has another tokenizer than this "
                        "run: the same ids are other words to it",
                        remedy=f'set tokenizer = {{ kind = "directory", path = "{member.foreign}" }}, or start from a model that '
                        "has the companion's tokenizer",
                    )

    def flush(self) -> None:
        for member in self.members.values():
            if member.cache is not None:
                member.cache.flush()

    def state_dict(self) -> Tree:
        """Companions that change or were copied from the model: what no path can bring back."""
        return {name: m.model.state_dict() for name, m in self.members.items() if m.stateful}

    def load_state_dict(self, state: Tree) -> None:
        for name, tensors in state.items():
            self.members[name].model.load_state_dict(tensors)


def _same_shapes(name: str, own: nn.Module, other: nn.Module, called: str) -> None:
    mine, theirs = own.state_dict(), other.state_dict()
    for key in sorted(mine.keys() | theirs.keys()):
        if key not in mine or key not in theirs or mine[key].shape != theirs[key].shape:
            raise RequestError(
                f"companion {name!r} cannot follow {called}: tensor {key!r} is not in both with one shape",
                remedy="a companion that moves must have the architecture of the model",
            )
