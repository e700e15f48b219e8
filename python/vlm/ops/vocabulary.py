"""Losses over a large vocabulary without its logits: cross-entropy and distillation of `hidden weight^T`.

N rows, C width, V ids. Sources: core-ce, llava-kd (the divergences). Logits exist for a few rows at a time. See `vocabulary_chunks`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlm.ops.backend import current_backend, one_device, use_native
from vlm.ops.cuda_core import cuda_kernels_of
from vlm.ops.vocabulary_chunks import CHUNK, chunked_cross_entropy
from vlm.ops.vocabulary_cuda import cross_entropy_cuda
from vlm.ops.vocabulary_reference import CrossEntropy, linear_cross_entropy_reference

Reduction = Literal["none", "mean", "sum"]
Schedule = Literal["forward", "recompute"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    allowed: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "none",
    gradients: Schedule = "forward",
    chunk: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of the logits z = hidden weight^T + bias against labels, and statistics of every row.

    hidden [N, C], weight [V, C], bias [V]; labels [N] integers, those equal to `ignore_index` left out: their rows are not read
    and have 0 everywhere. softcap c: z becomes c tanh(z / c). allowed [V] bool: other ids are removed, probability 0; a label must
    be allowed. With L = logsumexp z, the loss of a row is

        L - (1 - smoothing) z_label - smoothing * (mean of z over the allowed ids) + z_loss * L^2

    times its `token_weights` [N] (constants: no gradient). reduction: "none" [N]; "sum"; "mean", divided by the sum of the weights
    of the rows that count, 0 if there are none.

    gradients: "forward" makes them in the forward pass, three matrix products in all, and computes the chunks again (two more) only
    if the upstream gradient is not the same for every row; "recompute" always makes them in the backward pass, four products, and
    keeps no gradient between the passes. chunk: logits held at once, in elements, by default 2^24, and up to
    twice that for 256 rows of a large vocabulary.

    Half types are multiplied as they are, or as autocast says, on a GPU by torch itself; statistics and losses are float32 (float64
    for float64 input), and the gradient of `weight` is collected in it. Differentiable once, in hidden, weight and bias. Float32 on
    a GPU with the compiled kernels holds no logits at all: `gradients` and `chunk` are then without effect.
    Raises ValueError on shapes, dtypes, options or labels that do not fit.
    """
    _check(hidden, weight, bias, labels, token_weights, allowed)
    if chunk is None:  # measured: the gradient of the table is read and written once a chunk, so that chunks of few rows cost more
        chunk = min(max(CHUNK, 256 * weight.shape[0]), 2 * CHUNK)
    if not (0 <= smoothing < 1 and z_loss >= 0 and (softcap or 0) >= 0 and chunk >= 1):
        raise ValueError("linear_cross_entropy: smoothing must be in [0, 1), z_loss and softcap not negative, chunk positive")
    if reduction not in ("none", "mean", "sum") or gradients not in ("forward", "recompute"):
        raise ValueError(f"linear_cross_entropy: unknown reduction {reduction!r} or schedule {gradients!r}")
    factors = None if token_weights is None else token_weights.detach()
    valid = labels != ignore_index
    found: CrossEntropy
    if plain_torch():
        found = linear_cross_entropy_reference(
            hidden, weight, labels, bias=bias, ignore_index=ignore_index, smoothing=smoothing, z_loss=z_loss,
            softcap=softcap or 0.0, allowed=allowed, token_weights=factors,
        )  # fmt: skip
    else:
        labels = torch.where(valid, labels, -1).long()
        if not torch.compiler.is_compiling():
            _check_labels(labels, valid, len(weight), allowed)
        if allowed is not None:
            weight, bias, labels = restricted(weight, bias, labels, allowed)
        product = product_type(hidden, weight)
        keep = gradients == "forward" and torch.is_grad_enabled()
        wants = [keep and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        native = use_native(hidden, weight, bias, cuda=lambda: product == torch.float32)
        if native and cuda_kernels_of(hidden) is not None:
            hidden, weight = hidden.float(), weight.float()
            bias, factors = (None if t is None else t.float() for t in (bias, factors))
            found = CrossEntropy(*cross_entropy_cuda(hidden, weight, bias, labels, factors, smoothing, z_loss, softcap or 0.0))
        else:
            found = CrossEntropy(
                *chunked_cross_entropy(
                    hidden, weight, bias, labels, factors, smoothing, z_loss, softcap or 0.0, chunk, product, native, *wants
                )[:3]
            )
    loss, log_p, lse = found.loss, found.log_p.detach(), found.lse.detach()
    if reduction != "none":
        total = valid.sum() if factors is None else torch.where(valid, factors, 0.0).sum()
        loss = loss.sum()
        loss = loss / torch.where(total == 0, 1, total) if reduction == "mean" else loss
    return CrossEntropy(loss, log_p, lse)


def plain_torch() -> bool:
    """Whether the twin serves: forced by `backend("torch")`, or a graph is being exported. `backend("native")` asks for the
    chunks, which raise where the tensors are not for compiled kernels."""
    if current_backend() == "native":
        return False
    return current_backend() == "torch" or torch.compiler.is_exporting()


def product_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which hidden and weight are multiplied: autocast's, else their own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def restricted(
    weight: Tensor, bias: Tensor | None, labels: Tensor, allowed: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The allowed rows of weight and bias, and labels counted among them. What is removed is not read at all."""
    ids = allowed.nonzero()[:, 0]
    place = (allowed.cumsum(0) - 1)[labels.clamp(min=0)]
    labels = torch.where(labels >= 0, place, -1)
    if len(ids) and int(ids[-1] - ids[0]) + 1 == len(ids):  # one span: no copy
        span = slice(int(ids[0]), int(ids[-1]) + 1)
        return weight[span], None if bias is None else bias[span], labels
    return weight[ids], None if bias is None else bias[ids], labels


def _check_labels(labels: Tensor, valid: Tensor, ids: int, allowed: Tensor | None) -> None:
    """labels [N], -1 where not valid."""
    used = labels[valid]
    if len(used) and (int(used.min()) < 0 or int(used.max()) >= ids):
        raise ValueError(f"linear_cross_entropy: labels must be in 0..{ids - 1}, got {int(used.min())}..{int(used.max())}")
    if allowed is not None and not bool(allowed[used].all()):
        raise ValueError(f"linear_cross_entropy: label {int(used[~allowed[used]][0])} is not among the allowed ids")


def _check(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, token_weights: Tensor | None, allowed: Tensor | None
) -> None:
    check_factors("linear_cross_entropy", hidden, weight, bias)
    rows, ids = hidden.shape[0], weight.shape[0]
    if labels.shape != (rows,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"linear_cross_entropy: labels must be integers [{rows}], got {labels.dtype} {tuple(labels.shape)}")
    if token_weights is not None and (token_weights.shape != (rows,) or not token_weights.is_floating_point()):
        raise ValueError(f"linear_cross_entropy: token_weights must be floating [{rows}], got {tuple(token_weights.shape)}")
    if allowed is not None and (allowed.shape != (ids,) or allowed.dtype != torch.bool):
        raise ValueError(f"linear_cross_entropy: allowed must be bool [{ids}], got {allowed.dtype} {tuple(allowed.shape)}")


def check_factors(who: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise ValueError where hidden [N, C], weight [V, C] and bias [V] do not fit together."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"{who} wants hidden [N, C] and weight [V, C], got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    one_device(who, hidden, weight, bias)
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"{who}: hidden and weight must be floating, got {hidden.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"{who}: bias must be [{weight.shape[0]}], got {tuple(bias.shape)}")
    if weight.shape[0] == 0 and hidden.shape[0] != 0:
        raise ValueError(f"{who}: the vocabulary is empty")


__all__ = ["CrossEntropy", "linear_cross_entropy"]
