"""One update: gradients of all objectives over one global batch, exactly, whatever its partition.

The global batch is cut into ranks and micro-batches. Objectives of scope `sample` see one micro-batch and are
divided by the weight of the whole update, which they count beforehand. Objectives of scope `batch` see everything:
their leaves (embeddings, projected tokens) are computed first, gathered, differentiated, and the encoders are then
replayed micro-batch by micro-batch with the same random draws (gradient caching). The engine knows no model family.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from vlm.config.errors import RunFailed
from vlm.models import Model
from vlm.objectives import Objective
from vlm.schedules import Scalar, value_at
from vlm.training.companions import Companions
from vlm.training.requests import check_reads, check_streams
from vlm.types import Batch, Communicator, Context, Outputs, Stream, Terms, TokenIds, Views
from vlm.types.outputs import wanted_of
from vlm.types.random import draw_key

LEAF_FIELDS = ("embedding", "tokens")
"""Fields whose gradient can be cached between the two passes."""


@dataclass(frozen=True)
class Weighted:
    """An objective with its name and its weight over the stage."""

    name: str
    objective: Objective
    weight: Scalar


@dataclass
class UpdateResult:
    """loss: the weighted sum of all objectives. losses: each alone. scalars: what they reported."""

    loss: float
    losses: dict[str, float] = field(default_factory=dict)
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Clock:
    """Where the run stands: update `step` of `total` in its stage; `total` 0 when it has no end. Stage and loop round
    key the draws, so that they do not repeat one another's."""

    step: int
    total: int
    stage: int = 0
    round: int = 0

    def key(self, seed: int, purpose: str, *parts: int) -> int:
        """Seed of the draws of this update."""
        return draw_key(seed, purpose, self.round, self.stage, self.step, *parts)

    @property
    def progress(self) -> float:
        return self.step / self.total if self.total else 0.0


class Engine:
    """Computes gradients into `.grad`; the trainer owns the optimiser."""

    def __init__(
        self,
        model: Model,
        objectives: Sequence[Weighted],
        companions: Companions,
        communicator: Communicator,
        *,
        seed: int,
        precision: str = "float32",
    ) -> None:
        self.model = model
        self.objectives = list(objectives)
        self.companions = companions
        self.communicator = communicator
        self.seed = seed
        self.precision = precision
        self.requests = sorted({request for o in self.objectives for request in o.objective.requires})
        self.asked = {o.name: o.objective.requires for o in self.objectives}
        self.wanted = wanted_of(self.requests, "model")
        self._checked = False
        self.per_sample = [o for o in self.objectives if o.objective.scope == "sample"]
        self.per_batch = [o for o in self.objectives if o.objective.scope == "batch"]
        self._committed: list[tuple[Objective, Views, Context]] = []

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def update(self, batches: Sequence[Batch], clock: Clock) -> UpdateResult:
        """Fill the gradients for one global update; `batches` are this rank's micro-batches.

        Raises RequestError, at the first update, for an objective that asks what data or models do not give.
        """
        if not self._checked:
            check_streams(self.asked, {**self.companions.models(), "model": self.model}, batches[0])
            self.companions.check_texts(self.asked, batches[0])
            check_reads({o.name: o.objective.reads for o in (*self.per_sample, *self.per_batch)}, batches[0])
            self._checked = True
        totals = {o.name: self._total_weight(o, batches) for o in self.per_sample}
        sums: dict[str, Tensor] = {}
        scalars: dict[str, list[tuple[float, float]]] = {}
        leaves: list[_Leaves] = []
        self._committed = []
        kept: list[Views | None] = [None] * len(batches)
        prepared: list[list[Views]] = []
        keep = len(batches) == 1
        if self.per_batch:
            gathered = []
            for index, batch in enumerate(batches):
                with contextlib.nullcontext() if keep else torch.no_grad():
                    views = self._views(batch, clock, index)
                gathered.append(views)
                kept[index] = views if keep else None
            context = self._context(self._gathered_batch(batches), clock)
            prepared = [
                [entry.objective.prepare(views, self._context(batch, clock)) for views, batch in zip(gathered, batches)]
                for entry in self.per_batch
            ]
            leaves = [
                _Leaves(entry.name, parts, batches, self.communicator) for entry, parts in zip(self.per_batch, prepared)
            ]
            self._batch_scope(leaves, context, clock, sums, scalars)
            if self.communicator.rank:  # every rank computed the same: the parameters' share is counted once
                for parameter in self.parameters():
                    parameter.grad = None
        for index, batch in enumerate(batches):
            views = kept[index] or self._views(batch, clock, index)
            loss: Tensor | None = None
            for entry in self.per_sample:
                with torch.autocast("cpu", enabled=False):
                    terms = entry.objective(views, self._context(batch, clock))
                self._check_count(entry, terms, batch)
                part = terms.total() * (value_at(entry.weight, clock.progress) / max(totals[entry.name], 1e-12))
                loss = part if loss is None else loss + part
                value = terms.total().detach().double() / max(totals[entry.name], 1e-12)
                sums[entry.name] = sums.get(entry.name, torch.zeros((), dtype=torch.float64)) + value
                self._note(scalars, entry.name, terms)
            for entry, cut in zip(self.per_batch, leaves):
                part_views = prepared[self.per_batch.index(entry)][index] if keep else None
                if part_views is None:
                    part_views = entry.objective.prepare(views, self._context(batch, clock))
                replay = cut.pull(part_views, index)
                loss = replay if loss is None else loss if replay is None else loss + replay
            if loss is not None and loss.requires_grad:
                loss.backward()
            kept[index] = None
        self._share_gradients()
        return self._result(sums, scalars, clock)

    def commit(self) -> None:
        """After the optimiser's step: objectives with a memory (queues) take in the update they have just seen."""
        for objective, views, context in self._committed:
            objective.commit(views, context)
        self._committed = []

    def parameters(self) -> list[torch.nn.Parameter]:
        """Trainable parameters of the model and of the objectives, in a fixed order."""
        modules = [self.model, *(o.objective for o in self.objectives)]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def _views(self, batch: Batch, clock: Clock, index: int) -> Views:
        """Model and companion outputs of one micro-batch. Random layers draw from (seed, step, micro-batch, rank), so
        that a replay draws the same."""
        torch.manual_seed(clock.key(self.seed, "model", index, self.communicator.rank))
        views = Views()
        with self.autocast():
            for key, outputs in self.model.encode(batch, self.wanted).items():
                views[f"model/{key}"] = outputs
        views.update(self.companions.views(batch, self.requests, self.autocast))
        return views

    def _context(self, batch: Batch, clock: Clock) -> Context:
        return Context(
            batch=batch,
            communicator=self.communicator,
            step=clock.step,
            progress=clock.progress,
            draw_seed=clock.key(self.seed, "objective"),
        )

    def _total_weight(self, entry: Weighted, batches: Sequence[Batch]) -> float:
        counted = torch.stack([entry.objective.count(batch) for batch in batches]).sum().reshape(1)
        return float(self.communicator.sum(counted.double()))

    def _check_count(self, entry: Weighted, terms: Terms, batch: Batch) -> None:
        given, counted = float(terms.weights.sum()), float(entry.objective.count(batch))
        if abs(given - counted) > 1e-4 * max(1.0, abs(counted)):
            raise RunFailed(
                f"objective {entry.name!r} gave weight {given:g} where it had counted {counted:g}",
                remedy="its count() must equal the weights of its terms; otherwise accumulation would bias the loss",
            )

    def _gathered_batch(self, batches: Sequence[Batch]) -> Batch:
        """The streams that batch-scope objectives read (labels), over the whole update in leaf order."""
        names = sorted({name for o in self.per_batch for name in o.objective.reads})
        streams = {name: gather_streams([batch[name] for batch in batches], batches, self.communicator) for name in names}
        draws = torch.cat(self.communicator.gather_rows(torch.cat([batch.draws for batch in batches])))
        epoch = torch.cat(self.communicator.gather_rows(torch.cat([batch.epoch for batch in batches])))
        return Batch(streams, [""] * len(draws), draws, epoch)

    def _batch_scope(
        self,
        leaves: Sequence[_Leaves],
        context: Context,
        clock: Clock,
        sums: dict[str, Tensor],
        scalars: dict[str, list[tuple[float, float]]],
    ) -> None:
        temperature = self.model.temperature()
        loss: Tensor | None = None
        for entry, cut in zip(self.per_batch, leaves):
            views = cut.views(temperature)
            self._committed.append((entry.objective, cut.detached(), context))
            with torch.autocast("cpu", enabled=False):
                terms = entry.objective(views, context)
            value = terms.total() / terms.weights.sum().clamp(min=1e-12)
            part = value * value_at(entry.weight, clock.progress)
            loss = part if loss is None else loss + part
            share = 1 / self.communicator.size  # every rank holds the whole value; their sum must be the value
            sums[entry.name] = value.detach().double() * share
            self._note(scalars, entry.name, terms)
        if loss is not None and loss.requires_grad:
            loss.backward()

    def _note(self, scalars: dict[str, list[tuple[float, float]]], name: str, terms: Terms) -> None:
        weight = float(terms.weights.sum())
        for key, value in terms.scalars.items():
            # Of no terms a number may be nan (the mean of nothing), and nan times 0 is nan.
            scalars.setdefault(f"{name}/{key}", []).append((float(value) * weight if weight else 0.0, weight))

    def _share_gradients(self) -> None:
        """Sum gradients over ranks, in one flat buffer so that the order of additions is fixed.

        A parameter that no rank used keeps no gradient at all, as in one process, so that it is not decayed either.
        """
        if self.communicator.size == 1:
            return
        used = self.communicator.sum(torch.tensor([float(p.grad is not None) for p in self.parameters()]))
        parameters = [p for p, count in zip(self.parameters(), used.tolist()) if count]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
        flat = self.communicator.sum(flat)
        for parameter, grad in zip(parameters, flat.split([p.numel() for p in parameters])):
            parameter.grad = grad.view_as(parameter).clone()

    def _result(self, sums: Mapping[str, Tensor], scalars: Mapping[str, list[tuple[float, float]]], clock: Clock) -> UpdateResult:
        names = [o.name for o in self.objectives]
        keys = sorted(scalars)
        flat = [float(sums.get(name, 0.0)) for name in names]
        for key in keys:
            flat += [sum(v for v, _ in scalars[key]), sum(w for _, w in scalars[key])]
        shared = self.communicator.sum(torch.tensor(flat, dtype=torch.float64)).tolist()
        losses = dict(zip(names, shared))
        pairs = shared[len(names) :]
        means = {key: pairs[2 * i] / pairs[2 * i + 1] if pairs[2 * i + 1] else 0.0 for i, key in enumerate(keys)}
        weights = {o.name: value_at(o.weight, clock.progress) for o in self.objectives}
        return UpdateResult(sum(weights[n] * losses[n] for n in names), losses, means)


def gather_streams(parts: Sequence[Stream], batches: Sequence[Batch], communicator: Communicator) -> Stream:
    """One stream over micro-batches and ranks, every field of it; sample_index is counted over the whole update and
    rows of tokens are padded to the longest."""
    offsets = sample_offsets(batches, communicator)
    gathered: dict[str, Tensor] = {}
    for item in fields(parts[0]):
        pieces = [getattr(part, item.name) for part in parts]
        if any(piece is None for piece in pieces):
            continue
        if item.name == "sample_index":
            pieces = [piece + offset for piece, offset in zip(pieces, offsets)]
        if isinstance(parts[0], TokenIds) and pieces[0].dim() == 2:
            longest = max(n for (n,) in communicator.gather_numbers([max(piece.shape[1] for piece in pieces)]))
            pieces = [_padded(piece, longest, -1 if item.name == "segment" else 0) for piece in pieces]
        gathered[item.name] = torch.cat(communicator.gather_rows(torch.cat(pieces)))
    return type(parts[0])(**gathered)


def sample_offsets(batches: Sequence[Batch], communicator: Communicator) -> list[int]:
    """Number of the first sample of each of this rank's micro-batches within the whole update."""
    counts = communicator.gather_numbers([sum(len(batch) for batch in batches)])
    start = sum(numbers[0] for numbers in counts[: communicator.rank])
    return [start + sum(len(batch) for batch in batches[:i]) for i in range(len(batches))]


class _Leaves:
    """What one batch-scope objective reads, over the whole update and cut off from the encoders.

    parts: its prepared views, one a micro-batch. Embeddings and tokens of the model are leaves that collect a
    gradient, which `pull` hands back to each micro-batch.
    """

    def __init__(self, name: str, parts: Sequence[Views], batches: Sequence[Batch], communicator: Communicator) -> None:
        self.offsets = sample_offsets(batches, communicator)
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self.outputs: dict[str, Outputs] = {}
        for key in parts[0]:
            pieces = [views[key] for views in parts]
            held = [name for name in LEAF_FIELDS if getattr(pieces[0], name) is not None]
            if not held:
                raise RunFailed(f"objective {name!r} of scope batch: {key} holds none of {', '.join(LEAF_FIELDS)}")
            shared = {"sample_index": [p.sample_index + o for p, o in zip(pieces, self.offsets)], "mask": [p.mask for p in pieces]}
            for field_name in held:
                tensors = [getattr(piece, field_name) for piece in pieces]
                if field_name == "tokens":
                    longest = max(n for (n,) in communicator.gather_numbers([max(t.shape[1] for t in tensors)]))
                    tensors = [_padded(tensor, longest) for tensor in tensors]
                    masks = [p.token_mask for p in pieces]
                    shared["token_mask"] = [_padded(mask, longest) for mask in masks if mask is not None]
                ranks = communicator.gather_rows(torch.cat([tensor.detach() for tensor in tensors]))
                start = sum(len(rows) for rows in ranks[: communicator.rank])
                leaf = torch.cat(ranks).detach().requires_grad_(key.startswith("model/"))
                self.tensors[key, field_name] = leaf
                sizes = [len(tensor) for tensor in tensors]
                bounds = [start + sum(sizes[:i]) for i in range(len(sizes) + 1)]
                self.spans[key, field_name] = list(itertools.pairwise(bounds))
            rows: dict[str, Any] = {name: torch.cat(communicator.gather_rows(torch.cat(values))) for name, values in shared.items()}
            leaves: dict[str, Any] = {field_name: self.tensors[key, field_name] for field_name in held}
            self.outputs[key] = Outputs(**rows, **leaves, log_scale=pieces[0].log_scale, bias=pieces[0].bias)

    def detached(self) -> Views:
        """The whole update without gradient, for an objective that keeps a memory of it."""
        views = Views()
        for key, outputs in self.outputs.items():
            own: dict[str, Any] = {name: t.detach() for (k, name), t in self.tensors.items() if k == key}
            views[key] = replace(outputs, **own)
        return views

    def views(self, temperature: tuple[Tensor | None, Tensor | None]) -> Views:
        """The whole update as objectives see it; the model's own temperature carries its gradient."""
        log_scale, bias = temperature
        return Views(
            {
                key: replace(outputs, log_scale=log_scale, bias=bias) if key.startswith("model/") else outputs
                for key, outputs in self.outputs.items()
            }
        )

    def pull(self, views: Views, index: int) -> Tensor | None:
        """sum of <output, gradient of its leaf> of one micro-batch: its backward is the encoders' backward."""
        total: Tensor | None = None
        for (key, name), leaf in self.tensors.items():
            if leaf.grad is None:
                continue
            start, stop = self.spans[key, name][index]
            output = getattr(views[key], name)
            grad = leaf.grad[start:stop]
            if name == "tokens":
                grad = grad[:, : output.shape[1]]
            part = (output.float() * grad.float()).sum()
            total = part if total is None else total + part
        return total


def _padded(tensor: Tensor, length: int, value: int = 0) -> Tensor:
    """[n, N, ...] with the second axis filled to `length` by `value` (zero is False)."""
    if tensor.shape[1] == length:
        return tensor
    out = tensor.new_full((tensor.shape[0], length, *tensor.shape[2:]), value)
    out[:, : tensor.shape[1]] = tensor
    return out
