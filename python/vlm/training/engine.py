"""One update: gradients of all objectives over one global batch, exactly, whatever its partition.

The global batch is cut into ranks and micro-batches. Objectives of scope `sample` see one micro-batch and are
divided by the weight of the whole update, which they count beforehand. Objectives of scope `batch` see everything:
their leaves (embeddings, projected tokens) are computed first, gathered, differentiated, and the encoders are then
replayed micro-batch by micro-batch with the same random draws (gradient caching). The engine knows no model family.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vlm.config.errors import RunFailed
from vlm.models import Model
from vlm.objectives import Objective
from vlm.schedules import Scalar, value_at
from vlm.training.companions import Companions
from vlm.types import Batch, Communicator, Context, Outputs, Request, Stream, Terms, Views
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
    """Where the run stands: update `step` of `total` in its stage; `total` 0 when it has no end."""

    step: int
    total: int

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
        self.wanted = wanted_of(self.requests, "model")
        self.per_sample = [o for o in self.objectives if o.objective.scope == "sample"]
        self.per_batch = [o for o in self.objectives if o.objective.scope == "batch"]
        for entry in self.per_batch:
            for request in entry.objective.requires:
                if request.field not in LEAF_FIELDS:
                    raise RunFailed(
                        f"objective {entry.name!r} of scope batch asks for {request}, "
                        f"but only {' and '.join(LEAF_FIELDS)} can be gathered over the update"
                    )

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast("cpu", dtype=torch.bfloat16)

    def update(self, batches: Sequence[Batch], clock: Clock) -> UpdateResult:
        """Fill the gradients for one global update; `batches` are this rank's micro-batches."""
        totals = {o.name: self._total_weight(o, batches) for o in self.per_sample}
        sums: dict[str, Tensor] = {}
        scalars: dict[str, list[tuple[float, float]]] = {}
        leaves: _Leaves | None = None
        kept: list[Views | None] = [None] * len(batches)
        if self.per_batch:
            keep = len(batches) == 1
            gathered = []
            for index, batch in enumerate(batches):
                with contextlib.nullcontext() if keep else torch.no_grad():
                    views = self._views(batch, clock, index)
                gathered.append(views)
                kept[index] = views if keep else None
            leaves = _Leaves(self._leaf_requests(), gathered, batches, self.communicator)
            context = self._context(self._gathered_batch(batches), clock)
            self._batch_scope(leaves, context, clock, sums, scalars)
            if self.communicator.rank:  # every rank computed the same: the parameters' share is counted once
                for parameter in self.parameters():
                    parameter.grad = None
        for index, batch in enumerate(batches):
            if leaves is not None and not self.per_sample and not leaves.wants_gradient:
                continue
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
            replay = leaves.pull(views, index) if leaves is not None else None
            loss = replay if loss is None else loss if replay is None else loss + replay
            if loss is not None and loss.requires_grad:
                loss.backward()
            kept[index] = None
        self._share_gradients()
        return self._result(sums, scalars, clock)

    def parameters(self) -> list[torch.nn.Parameter]:
        """Trainable parameters of the model and of the objectives, in a fixed order."""
        modules = [self.model, *(o.objective for o in self.objectives)]
        return [p for module in modules for p in module.parameters() if p.requires_grad]

    def _views(self, batch: Batch, clock: Clock, index: int) -> Views:
        """Model and companion outputs of one micro-batch. Random layers draw from (seed, step, micro-batch, rank), so
        that a replay draws the same."""
        torch.manual_seed(draw_key(self.seed, "model", clock.step, index, self.communicator.rank))
        views = Views()
        with self.autocast():
            for stream, outputs in self.model.encode(batch, self.wanted).items():
                views[f"model/{stream}"] = outputs
        views.update(self.companions.views(batch, self.requests))
        return views

    def _context(self, batch: Batch, clock: Clock) -> Context:
        return Context(
            batch=batch,
            communicator=self.communicator,
            step=clock.step,
            progress=clock.progress,
            draw_seed=draw_key(self.seed, "objective", clock.step),
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

    def _leaf_requests(self) -> list[Request]:
        return sorted({request for o in self.per_batch for request in o.objective.requires})

    def _gathered_batch(self, batches: Sequence[Batch]) -> Batch:
        """The streams that batch-scope objectives read (labels), over the whole update in leaf order."""
        names = sorted({name for o in self.per_batch for name in o.objective.reads})
        streams = {name: gather_streams([batch[name] for batch in batches], batches, self.communicator) for name in names}
        draws = torch.cat(self.communicator.gather_rows(torch.cat([batch.draws for batch in batches])))
        epoch = torch.cat(self.communicator.gather_rows(torch.cat([batch.epoch for batch in batches])))
        return Batch(streams, [""] * len(draws), draws, epoch)

    def _batch_scope(
        self,
        leaves: _Leaves,
        context: Context,
        clock: Clock,
        sums: dict[str, Tensor],
        scalars: dict[str, list[tuple[float, float]]],
    ) -> None:
        temperature = self.model.temperature()
        views = leaves.views(temperature)
        loss: Tensor | None = None
        for entry in self.per_batch:
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
            scalars.setdefault(f"{name}/{key}", []).append((float(value) * weight, weight))

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
    """One stream over micro-batches and ranks, sample_index counted over the whole update."""
    offsets = sample_offsets(batches, communicator)
    index = torch.cat([part.sample_index + offset for part, offset in zip(parts, offsets)])
    values = torch.cat([part.values for part in parts])
    mask = torch.cat([part.mask for part in parts])
    return type(parts[0])(
        values=torch.cat(communicator.gather_rows(values)),
        mask=torch.cat(communicator.gather_rows(mask)),
        sample_index=torch.cat(communicator.gather_rows(index)),
    )


def sample_offsets(batches: Sequence[Batch], communicator: Communicator) -> list[int]:
    """Number of the first sample of each of this rank's micro-batches within the whole update."""
    counts = communicator.gather_numbers([sum(len(batch) for batch in batches)])
    start = sum(numbers[0] for numbers in counts[: communicator.rank])
    return [start + sum(len(batch) for batch in batches[:i]) for i in range(len(batches))]


class _Leaves:
    """Embeddings and tokens of the whole update, cut off from the encoders, whose gradients are handed back."""

    def __init__(
        self, requests: Sequence[Request], parts: Sequence[Views], batches: Sequence[Batch], communicator: Communicator
    ) -> None:
        self.offsets = sample_offsets(batches, communicator)
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.spans: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self.outputs: dict[str, Outputs] = {}
        for request in requests:
            key = f"{request.companion}/{request.stream}"
            pieces = [views[key] for views in parts]
            tensors = [getattr(piece, request.field) for piece in pieces]
            if any(tensor is None for tensor in tensors):
                raise RunFailed(f"{request} was asked for and not given")
            fields = {"sample_index": [p.sample_index + o for p, o in zip(pieces, self.offsets)], "mask": [p.mask for p in pieces]}
            if request.field == "tokens":
                longest = max(n for (n,) in communicator.gather_numbers([max(t.shape[1] for t in tensors)]))
                tensors = [_padded(tensor, longest) for tensor in tensors]
                fields["token_mask"] = [_padded(p.token_mask, longest) for p in pieces]
            own = torch.cat([tensor.detach() for tensor in tensors])
            ranks = communicator.gather_rows(own)
            start = sum(len(r) for r in ranks[: communicator.rank])
            leaf = torch.cat(ranks).detach()
            if request.companion == "model":
                leaf.requires_grad_(True)
            self.tensors[key, request.field] = leaf
            sizes = [len(tensor) for tensor in tensors]
            self.spans[key, request.field] = [(start + sum(sizes[:i]), start + sum(sizes[: i + 1])) for i in range(len(sizes))]
            shared = {name: torch.cat(communicator.gather_rows(torch.cat(values))) for name, values in fields.items()}
            known = self.outputs.get(key, Outputs(shared["sample_index"], shared["mask"], log_scale=pieces[0].log_scale, bias=pieces[0].bias))
            self.outputs[key] = replace(known, **{request.field: leaf}, **{k: v for k, v in shared.items() if k == "token_mask"})

    @property
    def wants_gradient(self) -> bool:
        return any(leaf.grad is not None for leaf in self.tensors.values())

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


def _padded(tensor: Tensor, length: int) -> Tensor:
    """[n, N, ...] with the second axis filled to `length` by zeros (False)."""
    if tensor.shape[1] == length:
        return tensor
    out = tensor.new_zeros((tensor.shape[0], length, *tensor.shape[2:]))
    out[:, : tensor.shape[1]] = tensor
    return out
