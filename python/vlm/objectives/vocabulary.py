"""What objectives need of vocabulary logits, position by position and in chunks.

The logits [n T, V] of a batch never exist at once. Losses take the chunked operators of `vlm.ops`; what they lack, `in_chunks` computes
from the logits of a few positions, and again in the backward pass. n rows, T positions, V ids, C width, R chosen positions, B samples.
Sources: every language model, povid, llava-kd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.config.errors import DataError, RunFailed
from vlm.ops import linear_cross_entropy, linear_distillation
from vlm.ops.vocabulary import Schedule
from vlm.ops.vocabulary_reference import Divergence, divergence_reference
from vlm.types import Batch, Layout, Outputs, TokenIds, Vocabulary
from vlm.types.layout import IGNORE, Modality

CHUNK = 2**24
"""Logits held at once, in elements (64 MiB of float32)."""

Unit = Literal["causal", "masked"]
"""`causal`: the logits of a position speak of the next one. `masked`: they speak of the position itself."""

Direction = Divergence


def bare(stream: str) -> str:
    """The stream of the batch behind a view: `answer.preferred@image.noisy` reads `answer.preferred`."""
    return stream.partition("@")[0]


# Positions


@dataclass(frozen=True)
class Positions:
    """R chosen positions, row by row and in order.

    row, position [R]: where the logits stand; about [R]: the position that they speak of; sample_index [R].
    """

    row: Tensor
    position: Tensor
    about: Tensor
    sample_index: Tensor

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, chosen: Tensor) -> Positions:
        return Positions(self.row[chosen], self.position[chosen], self.about[chosen], self.sample_index[chosen])

    def of(self, values: Tensor) -> Tensor:
        """values [n, T, ...] -> [R, ...] where the logits stand."""
        return values[self.row, self.position]

    def told(self, values: Tensor) -> Tensor:
        """values [n, T, ...] -> [R, ...] at the positions that the logits speak of."""
        return values[self.row, self.about]


def next_token_targets(layout: Layout) -> Tensor:
    """[n, T] target at each position: the label of the next position of the same document, else IGNORE."""
    target = torch.full_like(layout.label, IGNORE)
    same = layout.segment[:, 1:] == layout.segment[:, :-1]
    usable = layout.mask[:, 1:] & layout.mask[:, :-1] & same
    target[:, :-1] = torch.where(usable, layout.label[:, 1:], IGNORE)
    return target


def _chosen(layout: Layout, chosen: Tensor, step: int = 0) -> Positions:
    row, position = chosen.nonzero(as_tuple=True)
    return Positions(row, position, position + step, layout.sample_index[row])


def targets_of(layout: Layout, unit: Unit = "causal") -> Positions:
    """Where a supervised target is predicted. The first position of a document is no causal target."""
    if unit == "causal":
        return _chosen(layout, next_token_targets(layout) != IGNORE, step=1)
    return _chosen(layout, layout.mask & (layout.label != IGNORE))


def valid_of(layout: Layout) -> Positions:
    """Every valid position."""
    return _chosen(layout, layout.mask)


def visual_of(layout: Layout, leave_last: bool = True) -> Positions:
    """The positions of pictures.

    leave_last: without the last one of each picture, whose logits speak of the text that follows; a picture of a single position
    keeps it.
    """
    visual = _chosen(layout, layout.mask & (layout.modality == Modality.IMAGE))
    if not leave_last or not len(visual):
        return visual
    picture = visual.of(layout.picture)
    goes_on = (visual.row[1:] == visual.row[:-1]) & (picture[1:] == picture[:-1])
    first, last = torch.ones_like(visual.row, dtype=torch.bool), torch.ones_like(visual.row, dtype=torch.bool)
    first[1:], last[:-1] = ~goes_on, ~goes_on
    return visual[~last | (first & last)]


def batch_layout(batch: Batch, stream: str) -> Layout:
    """The layout of a token stream before any model has seen it: what `Objective.count` reads."""
    rows = batch[bare(stream)]
    if not isinstance(rows, TokenIds):
        raise TypeError(f"stream {bare(stream)!r} holds no tokens, it is {type(rows).__name__}")
    return Layout.of_tokens(
        rows.values, rows.mask, rows.sample_index, segment=rows.segment, supervised=rows.supervised, target=rows.target
    )


def match(first: Positions, second: Positions, keys: Sequence[str], *, what: str, names: tuple[str, str]) -> None:
    """The k-th position of a row of one view is the k-th of the same row of the other.

    keys [B]; what: such as "targets"; names: the two views. Raises RunFailed, which names the sample, for unequal counts.
    """
    rows = int(max([0, *(int(p.row.max()) + 1 for p in (first, second) if len(p))]))
    counts = [torch.bincount(p.row, minlength=rows) for p in (first, second)]
    for row in (counts[0] != counts[1]).nonzero().flatten().tolist():
        either = first if counts[0][row] else second
        sample = int(either.sample_index[either.row == row][0])
        raise RunFailed(
            f"{names[0]} has {int(counts[0][row])} {what} where {names[1]} has {int(counts[1][row])}",
            where=keys[sample],
            remedy="both must read the same rows, and their models must keep the same positions",
        )
    if not torch.equal(first.sample_index, second.sample_index):
        raise RunFailed(f"the rows of {names[0]} and {names[1]} belong to different samples")


def same(first: Tensor, second: Tensor, positions: Positions, keys: Sequence[str], message: str, remedy: str) -> None:
    """Raise RunFailed, which names the sample, where two vectors [R] of matched positions differ."""
    for at in (first != second).nonzero().flatten().tolist()[:1]:
        raise RunFailed(message, where=keys[int(positions.sample_index[at])], remedy=remedy)


def one_row_a_sample(view: Outputs, keys: Sequence[str], name: str) -> None:
    """Raises DataError, which names the sample, where a sample has several rows."""
    counts = torch.bincount(view.sample_index, minlength=len(keys))
    for sample in (counts > 1).nonzero().flatten().tolist()[:1]:
        raise DataError(
            f"stream {name!r} has {int(counts[sample])} rows of one sample, expected one",
            where=keys[sample],
            remedy="rows with different roles are different streams",
        )


# Reductions over the positions of a sample


def sample_sums(values: Tensor, sample_index: Tensor, samples: int) -> Tensor:
    """values [R] -> [B], the sum of each sample's values; 0 where it has none."""
    return values.new_zeros(samples).index_add(0, sample_index, values)


def sample_counts(sample_index: Tensor, samples: int) -> Tensor:
    """[B] int64: how many positions each sample has."""
    return torch.bincount(sample_index, minlength=samples)


def sample_means(values: Tensor, sample_index: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """values [R] -> (means [B], weights [B]): weight 1, or 0 and mean 0 where a sample has no value."""
    counts = sample_counts(sample_index, samples)
    means = sample_sums(values, sample_index, samples) / counts.clamp(min=1)
    return means, (counts > 0).to(values.dtype)


# Chunks


def exact(values: Tensor) -> Tensor:
    """At least float32: half precision is widened, float64 stays."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def logits_of(vocabulary: Vocabulary, hidden: Tensor, ids: slice = slice(None)) -> Tensor:
    """hidden [..., C] -> logits [..., V], or those of a slice of the ids, at least float32."""
    weight, bias = vocabulary.weight[ids], None if vocabulary.bias is None else vocabulary.bias[ids]
    return exact(replace(vocabulary, hidden=hidden.to(weight.dtype), weight=weight, bias=bias).logits())


def detached(vocabulary: Vocabulary) -> Vocabulary:
    """The same factors without gradient."""
    bias = None if vocabulary.bias is None else vocabulary.bias.detach()
    return replace(vocabulary, hidden=vocabulary.hidden.detach(), weight=vocabulary.weight.detach(), bias=bias)


def in_chunks(
    function: Callable[..., tuple[Tensor, ...]],
    parts: Sequence[tuple[Vocabulary, Tensor]],
    *rows: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, ...]:
    """function(logits [r, V] of each part, *rows [r, ...]) -> tensors [r, ...], over chunks of R rows, put together again.

    parts: (vocabulary, hidden [R, C]). chunk: logits of one part held at once. Nothing [r, V] is kept for the backward pass.
    """

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        logits = [logits_of(vocabulary, hidden) for (vocabulary, _), hidden in zip(parts, tensors)]
        return function(*logits, *tensors[len(parts) :])

    size = max(1, chunk // max(vocabulary.weight.shape[0] for vocabulary, _ in parts))
    pieces = zip(*(tensor.split(size) for tensor in (*(hidden for _, hidden in parts), *rows)))
    done = [checkpoint(run, *piece, use_reentrant=False, preserve_rng_state=False) for piece in pieces]
    return tuple(torch.cat(column) for column in zip(*done))


def cross_entropy_of(
    vocabulary: Vocabulary,
    hidden: Tensor,
    ids: Tensor,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    allowed: Tensor | None = None,
    token_weights: Tensor | None = None,
    gradients: Schedule = "forward",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden [R, C] against ids [R], among the `allowed` [V] -> (losses, times `token_weights` [R], with gradient; plain -log p
    without), both [R]."""
    found = linear_cross_entropy(
        hidden,
        vocabulary.weight,
        ids,
        bias=vocabulary.bias,
        smoothing=smoothing,
        z_loss=z_loss,
        softcap=vocabulary.softcap,
        allowed=allowed,
        token_weights=token_weights,
        gradients=gradients,
        chunk=chunk,
    )
    return found.loss, -found.log_p


def factors_of(view: Outputs) -> tuple[Vocabulary, Layout]:
    """The vocabulary of a view and its layout."""
    assert view.vocabulary is not None
    assert view.layout is not None
    return view.vocabulary, view.layout


def target_log_probabilities(
    view: Outputs, *, unit: Unit = "causal", chosen: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Positions]:
    """(log p of the target at each of its positions [R], the positions).

    chosen [R, K]: further ids laid on the same positions; then the first result is [R, 1 + K], the target in column 0.
    """
    vocabulary, layout = factors_of(view)
    targets = targets_of(layout, unit)
    hidden, ids = targets.of(vocabulary.hidden), targets.told(layout.label)
    if chosen is None:
        return -cross_entropy_of(vocabulary, hidden, ids, chunk=chunk)[0], targets

    def pick(logits: Tensor, ids: Tensor) -> tuple[Tensor]:
        return (logits.log_softmax(-1).gather(1, ids),)

    (scores,) = in_chunks(pick, [(vocabulary, hidden)], torch.cat([ids[:, None], chosen], dim=1), chunk=chunk)
    return scores, targets


@torch.no_grad()
def argmax_tokens(
    view: Outputs, *, unit: Unit = "causal", size: int | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Positions]:
    """(the likeliest id at each position that predicts a target [R], the positions). size: only ids below it may be chosen."""
    vocabulary, layout = factors_of(view)
    targets = targets_of(layout, unit)

    def pick(logits: Tensor) -> tuple[Tensor]:
        return (logits[:, :size].argmax(-1),)

    (ids,) = in_chunks(pick, [(vocabulary, targets.of(vocabulary.hidden))], chunk=chunk)
    return ids, targets


@torch.no_grad()
def likeliest_tokens(vocabulary: Vocabulary, hidden: Tensor, count: int, *, size: int | None = None, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """hidden [R, C] -> the largest logits and their ids, [R, K] with K = min(count, V). size: only ids below it may be chosen."""

    def pick(logits: Tensor) -> tuple[Tensor, Tensor]:
        found = logits[:, :size].topk(min(count, logits[:, :size].shape[1]), dim=1)
        return found.values, found.indices

    logits, ids = in_chunks(pick, [(vocabulary, hidden)], chunk=chunk)
    return logits, ids


# Divergences


def divergence(
    student: Tensor,
    teacher: Tensor,
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    mix: float | None = None,
) -> Tensor:
    """student [R, V], teacher [R, W] logits -> [R]; see `vlm.ops.vocabulary_reference.divergence_reference`."""
    return divergence_reference(student, teacher, divergence=direction, temperature=temperature, mix=mix)


def position_divergences(
    student: tuple[Vocabulary, Tensor],
    teacher: tuple[Vocabulary, Tensor],
    *,
    direction: Direction = "forward",
    temperature: float = 1.0,
    mix: float | None = None,
    top: int = 0,
    token_weights: Tensor | None = None,
    gradients: Schedule = "forward",
    chunk: int = CHUNK,
) -> Tensor:
    """[R]: `divergence` at R positions of two views, each (vocabulary, hidden [R, C]), times `token_weights` [R]. The teacher gets
    no gradient. top: only so many of the teacher's ids have a probability, its likeliest; 0: all (direction "forward" alone)."""
    (own, hidden), (other, taught) = student, teacher
    if top:
        return linear_distillation(
            hidden,
            own.weight,
            teacher_top=likeliest_tokens(other, taught, top, size=own.weight.shape[0], chunk=chunk),
            bias=own.bias,
            softcap=own.softcap,
            divergence=direction,
            temperature=temperature,
            token_weights=token_weights,
            gradients=gradients,
            chunk=chunk,
        )
    return linear_distillation(
        hidden,
        own.weight,
        taught,
        other.weight,
        bias=own.bias,
        teacher_bias=other.bias,
        softcap=own.softcap,
        teacher_softcap=other.softcap,
        divergence=direction,
        temperature=temperature,
        mix=mix,
        token_weights=token_weights,
        gradients=gradients,
        chunk=chunk,
    )
