"""Contrastive objective: matched pairs against all other pairs of the update.

n rows of a stream, B pairs, E embedding width. Sources: clip, siglip, filip, core-infonce, core-siglip, core-filip; mug-stan,
dreamlip (slots), flame (multi), ctp (queue), cloc (similar pairs).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm import ops
from vlm.layers import normalise
from vlm.objectives.base import BuildContext, Objective
from vlm.objectives.contrastive_options import ContrastiveFields
from vlm.objectives.contrastive_targets import (
    likely_labels,
    likely_targets,
    listed_columns,
    numbers_of,
    place_in_sample,
    shares_of,
    where,
)
from vlm.types import Batch, Context, Outputs, Request, Terms, Views
from vlm.types.terms import Scope

Pairing = tuple[Tensor, Tensor]
"""Rows of either stream, [r] and [c]."""


class ContrastiveOptions(ContrastiveFields):
    """Similarity of two streams; softmax (CLIP) or sigmoid (SigLIP) form."""

    def build(self, context: BuildContext) -> ContrastiveObjective:
        width = getattr(context.model.options, "embed_dim", None)
        if self.queue and width is None:
            raise ValueError("queue wants a model that says its embed_dim, as a dual encoder does")
        return ContrastiveObjective(self, width or 0)


class ContrastiveObjective(Objective):
    """One value a pair: the mean of its row's and its column's loss."""

    scope: Scope = "batch"
    queue_rows: Tensor
    queue_columns: Tensor
    filled: Tensor

    def __init__(self, options: ContrastiveOptions, width: int = 0) -> None:
        super().__init__()
        self.options = options
        if options.gather != "all":
            self.scope = "sample"
        field = "embedding" if options.similarity == "global" else "tokens"
        streams = (options.rows, options.columns)
        asked = [f"model/{stream}.{field}" for stream in streams]
        if options.teacher is not None:
            asked += [f"{options.teacher}/{stream}.embedding" for stream in streams]
        if options.queue and options.keys != "model":
            asked += [f"{options.keys}/{stream}.embedding" for stream in streams]
        self.requires = tuple(Request.parse(request) for request in asked)
        grouped = ("group",) if options.targets == "groups" or options.exclude == "group" else ()
        numbers = (name for name in (options.weights, options.smooth_by, options.shares) if name is not None)
        self.reads = tuple(dict.fromkeys((*grouped, *numbers)))
        if options.temperature == "own":
            sigmoid = options.form == "sigmoid"
            self.log_scale = nn.Parameter(torch.tensor(math.log(10.0 if sigmoid else 1 / 0.07)))
            self.own_bias = nn.Parameter(torch.tensor(-10.0)) if sigmoid else None
        if options.queue:
            self.register_buffer("queue_rows", torch.zeros(options.queue, width))
            self.register_buffer("queue_columns", torch.zeros(options.queue, width))
            self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    def temperature(self, view: Outputs) -> tuple[Tensor, Tensor]:
        """(log scale, bias)"""
        setting = self.options.temperature
        if setting == "own":
            zero = torch.zeros(()) if self.own_bias is None else self.own_bias
            return self.log_scale, zero
        if setting == "model":
            if view.log_scale is None:
                raise ValueError('temperature = "model", but the model has no similarity scale; use "own" or a number')
            return view.log_scale, torch.zeros(()) if view.bias is None else view.bias
        return torch.tensor(-math.log(float(setting))), torch.zeros(())

    def count(self, batch: Batch) -> Tensor:
        """gather "ring" and "none": the weights of the pairs of one micro-batch."""
        rows, columns = batch[self.options.rows], batch[self.options.columns]
        left, right = (s.mask if s.mask.dim() == 1 else s.mask.flatten(1).any(1) for s in (rows, columns))
        live = left & torch.isin(rows.sample_index, columns.sample_index[right])
        return numbers_of(batch, self.options.weights, rows.sample_index[live]).double().sum()

    def prepare(self, views: Views, context: Context) -> Views:
        """What is sent to other ranks: token means, or the tokens that match best within the micro-batch (FILIP)."""
        out = super().prepare(views, context)
        keys = [f"model/{stream}" for stream in (self.options.rows, self.options.columns)]
        if self.options.similarity == "token-mean":
            for key in keys:
                out[key] = replace(out[key], embedding=_token_mean(out[key]), tokens=None, token_mask=None)
        elif self.options.keep_ratio < 1:
            sides = [_tokens(out[key]) for key in keys]
            for key, (own, mask), (other, other_mask) in zip(keys, sides, reversed(sides)):
                keep = math.ceil(self.options.keep_ratio * own.shape[1])
                index = ops.select_tokens(normalise(own), normalise(other), keep, mask=mask, mask_others=other_mask)
                tokens, kept = ops.take_tokens(own, index)
                out[key] = replace(out[key], tokens=tokens, token_mask=kept)
        return out

    def commit(self, views: Views, context: Context) -> None:
        """The queue takes in the update's embeddings, the newest first."""
        if not self.options.queue:
            return
        left, right = (views[f"{self.options.keys}/{stream}"] for stream in (self.options.rows, self.options.columns))
        assert left.embedding is not None
        assert right.embedding is not None
        live = left.mask & right.mask
        for queue, new in ((self.queue_rows, left.embedding[live]), (self.queue_columns, right.embedding[live])):
            queue.copy_(torch.cat([normalise(new.detach().to(queue)), queue])[: len(queue)])
        self.filled.copy_(torch.clamp(self.filled + live.sum(), max=self.options.queue))

    def forward(self, views: Views, context: Context) -> Terms:
        """values [B] >= 0; a pair with a masked side is left out. A sample's weight is that of the stream `weights`."""
        if self.scope == "sample":
            views = self.prepare(views, context)
        left, right = views[f"model/{self.options.rows}"], views[f"model/{self.options.columns}"]
        log_scale, bias = self.temperature(left)
        many = self.options.targets in ("multi", "slots", "listed")
        if not many and not torch.equal(left.sample_index, right.sample_index):
            raise ValueError(
                f"streams {self.options.rows!r} and {self.options.columns!r} must have one row a sample, in the same order"
            )
        live, pairings = self._pairings(left, right)
        values = torch.zeros(0)
        total = seen = None
        for rows, columns in pairings:
            place = torch.searchsorted(live, rows)  # live rows ascend
            part = self._values(views, context, (rows, columns), log_scale, bias)
            total = part.new_zeros(len(live)) if total is None else total
            seen = part.new_zeros(len(live)) if seen is None else seen
            total, seen = total.index_add(0, place, part), seen.index_add(0, place, torch.ones_like(part))
        if total is not None and seen is not None:
            values = total / seen.clamp(min=1)
        index = left.sample_index[live]
        weights = numbers_of(context.batch, self.options.weights, index).to(values)
        return Terms(values=values, weights=weights, sample_index=index, scalars={"scale": log_scale.detach().exp()})

    def _pairings(self, left: Outputs, right: Outputs) -> tuple[Tensor, list[Pairing]]:
        """Rows that have a term, and what is compared: all rows with all columns, or those of one slot at a time."""
        if self.options.targets not in ("multi", "slots", "listed"):
            live = (left.mask & right.mask).nonzero().flatten()
            return live, [(live, live)]
        live = (left.mask & torch.isin(left.sample_index, right.sample_index[right.mask])).nonzero().flatten()
        if len(left.sample_index.unique()) != len(left.sample_index):
            raise ValueError(f"stream {self.options.rows!r} must have one row a sample for targets = {self.options.targets!r}")
        columns = (right.mask & torch.isin(right.sample_index, left.sample_index[live])).nonzero().flatten()
        if self.options.targets in ("multi", "listed"):
            return live, [(live, columns)]
        slot = place_in_sample(right.sample_index)[columns]
        row_of = live[where(left.sample_index[live])[right.sample_index[columns]]]
        pairings = []
        for k in slot.unique().tolist():
            rows, own = row_of[slot == k], columns[slot == k]
            order = rows.argsort()
            pairings.append((rows[order], own[order]))
        return live, pairings

    def _values(self, views: Views, context: Context, pairing: Pairing, log_scale: Tensor, bias: Tensor) -> Tensor:
        """Values of the rows of one pairing, [r]."""
        rows, columns = pairing
        left, right = views[f"model/{self.options.rows}"], views[f"model/{self.options.columns}"]
        options = self._relations(views, context, pairing, log_scale, bias)
        if self.options.similarity in ("global", "token-mean"):
            assert left.embedding is not None
            assert right.embedding is not None
            by_row, by_column = self._embeddings(normalise(left.embedding[rows]), normalise(right.embedding[columns]),
                                                 log_scale, bias, options, context)
        else:
            by_row, by_column = self._matrices(left, right, pairing, log_scale, bias, options)
        if self.options.targets in ("multi", "listed"):  # a sample has several columns: their mean
            place = where(left.sample_index[rows])[right.sample_index[columns]]
            by_column = by_row.new_zeros(len(rows)).index_add(0, place, by_column * self._parts(context.batch, right, columns, place))
        if self.options.direction == "both":
            return 0.5 * (by_row + by_column)
        return by_row if self.options.direction == "rows" else by_column

    def _relations(self, views: Views, context: Context, pairing: Pairing, log_scale: Tensor, bias: Tensor) -> dict[str, Any]:
        """Positives, excluded pairs and soft targets, as the operators take them."""
        rows, columns = pairing
        options: dict[str, Any] = {}
        left, right = views[f"model/{self.options.rows}"], views[f"model/{self.options.columns}"]
        if self.reads and "group" in self.reads:
            group = context.batch["group"]
            values = group.values[where(group.sample_index)]  # by sample: a sample may have a group and no row
            kind = "groups" if self.options.targets == "groups" else "exclude"
            options |= {f"{kind}_x": values[left.sample_index[rows]], f"{kind}_y": values[right.sample_index[columns]]}
        if self.options.targets in ("multi", "listed"):
            options |= {"groups_x": left.sample_index[rows], "groups_y": right.sample_index[columns]}
        scale = float(log_scale.detach().exp()) if self.options.teacher_scale is None else self.options.teacher_scale
        if self.options.teacher is not None:
            a, b = (views[f"{self.options.teacher}/{s}"].embedding for s in (self.options.rows, self.options.columns))
            assert a is not None
            assert b is not None
            x, y = normalise(a[rows].detach()), normalise(b[columns].detach())
            share, top = self.options.teacher_share, self.options.teacher_top
            if top == 0:
                options["teacher"] = ops.Teacher(x, y, scale, share, float(bias.detach()))
            elif self.options.form == "softmax":
                options |= {"listed_x": likely_targets(x, y, top, scale, share), "listed_y": likely_targets(y, x, top, scale, share)}
            else:
                options["listed"] = likely_labels(x, y, top, scale, float(bias.detach()), share)
        if self.options.exclude_similar is not None:
            own = right.embedding[columns] if right.embedding is not None else _token_mean(right)[columns]
            if len(rows) != len(columns):
                raise ValueError("exclude_similar wants one column a row")
            own = normalise(own.detach())
            options["teacher"] = ops.Teacher(own, own, share=0.0, similar=self.options.exclude_similar)
        if self.options.targets == "listed":
            options |= self._listed(views, context.batch, pairing)
        return options | self._smoothing(views, context.batch, pairing)

    def _listed(self, views: Views, batch: Batch, pairing: Pairing) -> dict[str, Any]:
        """The columns of each sample with their shares."""
        rows, columns = pairing
        left, right = views[f"model/{self.options.rows}"], views[f"model/{self.options.columns}"]
        place = where(left.sample_index[rows])[right.sample_index[columns]]
        if self.options.form == "softmax":
            index, weight = listed_columns(place, self._parts(batch, right, columns, place), len(rows))
            # A column has one row, its own; a sample without any share has no target.
            some = (weight.sum(1) > 0).to(weight)[place]
            return {"listed_x": (index, weight), "listed_y": (place[:, None], some[:, None])}
        assert self.options.shares is not None
        shares = shares_of(batch, self.options.shares, right.sample_index, columns)
        if bool((shares > 1).any()):
            raise ValueError(f"stream {self.options.shares!r}: a label must be at most 1, found {float(shares.max()):g}")
        rest = 1.0 if self.options.teacher is None else 1 - self.options.teacher_share
        return {"listed": listed_columns(place, rest * shares.float(), len(rows))}

    def _parts(self, batch: Batch, right: Outputs, columns: Tensor, place: Tensor) -> Tensor:
        """What each column counts in its sample, [c]; the sum is 1 for a sample, or 0 where it has no share."""
        shares = torch.ones(len(columns), device=place.device)
        if self.options.shares is not None:
            shares = shares_of(batch, self.options.shares, right.sample_index, columns).float()
        total = shares.new_zeros(int(place.max()) + 1 if len(place) else 0).index_add(0, place, shares)
        return shares / torch.where(total > 0, total, 1.0)[place]

    def _smoothing(self, views: Views, batch: Batch, pairing: Pairing) -> dict[str, Any]:
        """`smoothing` of the softmax form, `labels` of the sigmoid form; of every sample alike or of each its own."""
        chosen = self.options
        left, right = (views[f"model/{stream}"].sample_index[i] for stream, i in zip((chosen.rows, chosen.columns), pairing))
        kept = 1.0 if chosen.teacher_top == 0 else 1 - chosen.teacher_share  # the teacher's few pairs come on top
        high: Tensor | float = 1.0
        low: Tensor | float = 0.0
        if chosen.smooth_by is not None:
            both = [numbers_of(batch, chosen.smooth_by, side) for side in (left, right)]
            if any(bool(((n < 0) | (n > 1)).any()) for n in both):
                raise ValueError(f"stream {chosen.smooth_by!r}: expected numbers in 0..1")
            if chosen.form == "softmax":
                return {"smoothing": (chosen.smoothing * both[0], chosen.smoothing * both[1])}
            high = 1 - chosen.smoothing * both[0]
        elif chosen.form == "softmax":
            return {"smoothing": chosen.smoothing}
        else:
            high, low = 1 - chosen.smoothing, chosen.smoothing
        if chosen.targets == "listed":
            high = 0.0  # the list says it all
        if kept == 1 and chosen.smoothing == 0 and chosen.targets != "listed":
            return {}
        ones = torch.ones(len(left))
        return {"labels": (ones * kept * high, ones * kept * low)}

    def _embeddings(self, x: Tensor, y: Tensor, log_scale: Tensor, bias: Tensor, options: dict[str, Any],
                    context: Context) -> tuple[Tensor, Tensor]:
        chosen = self.options
        x, y = (x.detach() if chosen.gradient == "columns" else x), (y.detach() if chosen.gradient == "rows" else y)
        log_scale, bias = log_scale.to(x).reshape(()), bias.to(x).reshape(())
        softmax = chosen.form == "softmax"
        if chosen.gather == "ring":
            return ops.ring_contrastive(
                chosen.form, x, y, log_scale, None if softmax else bias, context.communicator, groups=options.get("groups_x"),
                exclude=options.get("exclude_x"), smoothing=options.get("smoothing", 0.0), decoupled=chosen.decoupled,
                teacher=options.get("teacher"))
        if softmax:
            if chosen.queue:
                held = int(self.filled)
                options |= {"queue_x": self.queue_rows[:held].to(x), "queue_y": self.queue_columns[:held].to(x)}
            return ops.contrastive_softmax(x, y, log_scale, decoupled=chosen.decoupled, **options)
        return ops.contrastive_sigmoid(x, y, log_scale, bias, negative_weight=chosen.negative_weight, **options)

    def _matrices(self, left: Outputs, right: Outputs, pairing: Pairing, log_scale: Tensor, bias: Tensor,
                  options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        chosen = self.options
        (v, mask_v), (w, mask_w) = ((t[i], m[i]) for (t, m), i in zip(map(_tokens, (left, right)), pairing))
        v, w = normalise(v), normalise(w)
        v, w = (v.detach() if chosen.gradient == "columns" else v), (w.detach() if chosen.gradient == "rows" else w)
        if chosen.similarity == "late-max":
            rows, columns = ops.late_interaction(v, w, mask_v=mask_v, mask_w=mask_w, mean=chosen.aggregate == "mean")
        else:
            rows = columns = ops.mutual_guided(v, w, mask_v=mask_v, mask_w=mask_w, sharpness=chosen.sharpness)
        return ops.contrastive_matrices(rows, columns, log_scale.to(v), None if chosen.form == "softmax" else bias.to(v),
                                        decoupled=chosen.decoupled, negative_weight=chosen.negative_weight, **options)


def _tokens(view: Outputs) -> tuple[Tensor, Tensor]:
    assert view.tokens is not None
    assert view.token_mask is not None
    return view.tokens, view.token_mask & view.mask[:, None]


def _token_mean(view: Outputs) -> Tensor:
    """[n, E]: the mean of the tokens that count."""
    tokens, mask = _tokens(view)
    kept = torch.where(mask[..., None], tokens, torch.zeros_like(tokens))
    return kept.sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
