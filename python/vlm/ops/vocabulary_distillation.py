"""Distillation of distributions over the vocabulary without the logits of all rows. Sources: llava-kd, core-ce (kd).

N rows, C width of the student, D of the teacher, V and W ids, K ids of a short list. See `vocabulary_teachers`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlm.ops.backend import use_native
from vlm.ops.vocabulary import Reduction, Schedule, check_factors, plain_torch, product_type
from vlm.ops.vocabulary_chunks import CHUNK
from vlm.ops.vocabulary_reference import MIX, Divergence, linear_distillation_reference
from vlm.ops.vocabulary_teachers import chunked_distillation

_KINDS = ("forward", "reverse", "symmetric", "js", "skew", "tv")


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    *,
    teacher_logits: Tensor | None = None,
    teacher_top: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    softcap: float | None = None,
    teacher_softcap: float | None = None,
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    mix: float | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
    reduction: Reduction = "none",
    gradients: Schedule = "forward",
    chunk: int = CHUNK,
) -> Tensor:
    """How far the student's distribution S = softmax(z / temperature), z = hidden weight^T + bias, is from the teacher's Q.

    hidden [N, C], weight [V, C]. The teacher is one of: factors teacher_hidden [N, D] and teacher_weight [W, D]; teacher_logits
    [N, W]; teacher_top, logits and ids [N, K] of a short list, beyond which Q is 0 (divergence "forward" only). Ids that either side
    lacks, beyond the smaller vocabulary or with a logit of -inf, are left out of both.
    divergence, mix: see `vlm.ops.vocabulary_reference.divergence_reference`; the value is not multiplied by temperature^2.
    mask [N] bool: rows that count; the others are not read and have 0. token_weights [N], reduction, gradients, chunk: as in
    `linear_cross_entropy`; the mean divides by the sum of the weights of the rows that count.

    float32 statistics and result (float64 for float64 input). The teacher gets no gradient. Raises ValueError on what does not fit.
    """
    kind, teacher = _teacher(hidden, teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_top)
    check_factors("linear_distillation", hidden, weight, bias)
    _check(hidden, divergence, temperature, mix, mask, token_weights, kind, reduction, gradients)
    share = MIX.get(divergence, 0.5) if mix is None else mix
    factors = None if token_weights is None else token_weights.detach()
    if plain_torch():
        logits, ids = teacher[0], None
        if kind == "factors":
            logits = teacher[0] @ teacher[1].T + (teacher[2] if len(teacher) > 2 else 0)
            logits = teacher_softcap * torch.tanh(logits / teacher_softcap) if teacher_softcap else logits
        elif kind == "top":
            ids = teacher[1]
        values = linear_distillation_reference(
            hidden, weight, logits, ids, bias=bias, softcap=softcap or 0.0, divergence=divergence, temperature=temperature,
            mix=share, mask=mask, token_weights=factors,
        )  # fmt: skip
    else:
        keep = gradients == "forward" and torch.is_grad_enabled()
        wants = [keep and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        product = product_type(hidden, weight)
        taught = product_type(teacher[0], teacher[1]) if kind == "factors" else product
        values = chunked_distillation(
            hidden, weight, bias, teacher, mask, factors, kind, divergence, temperature, share, softcap or 0.0,
            teacher_softcap or 0.0, chunk, product, taught, use_native(hidden, weight, bias), *wants,
        )[0]  # fmt: skip
    if reduction == "none":
        return values
    valid = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    total = valid.sum() if factors is None else torch.where(valid, factors, 0.0).sum()
    summed = values.sum()
    return summed / torch.where(total == 0, 1, total) if reduction == "mean" else summed


def _teacher(
    hidden: Tensor, teacher_hidden: Tensor | None, teacher_weight: Tensor | None, teacher_bias: Tensor | None,
    logits: Tensor | None, top: tuple[Tensor, Tensor] | None,
) -> tuple[str, list[Tensor]]:  # fmt: skip
    """The kind of teacher and its tensors, detached. Raises ValueError unless there is exactly one."""
    rows = hidden.shape[0]
    given = (teacher_hidden is not None or teacher_weight is not None) + (logits is not None) + (top is not None)
    if given != 1 or (teacher_hidden is None) != (teacher_weight is None):
        raise ValueError("linear_distillation wants one teacher: hidden and weight, logits, or a short list")
    if teacher_hidden is not None and teacher_weight is not None:
        check_factors("linear_distillation (teacher)", teacher_hidden, teacher_weight, teacher_bias)
        parts = [teacher_hidden, teacher_weight] + ([] if teacher_bias is None else [teacher_bias])
        kind = "factors"
    elif logits is not None:
        parts, kind = [logits], "logits"
    else:
        assert top is not None
        parts, kind = list(top), "top"
        if parts[0].shape != parts[1].shape or parts[1].is_floating_point():
            raise ValueError(f"linear_distillation: a short list is logits and ids [N, K], got {[tuple(p.shape) for p in parts]}")
    if parts[0].ndim != 2 or parts[0].shape[0] != rows:
        raise ValueError(f"linear_distillation: the teacher must have {rows} rows, got {tuple(parts[0].shape)}")
    return kind, [p.detach() for p in parts]


def _check(
    hidden: Tensor, divergence: str, temperature: float, mix: float | None, mask: Tensor | None, token_weights: Tensor | None,
    kind: str, reduction: str, gradients: str,
) -> None:  # fmt: skip
    rows = hidden.shape[0]
    if divergence not in _KINDS:
        raise ValueError(f"linear_distillation: unknown divergence {divergence!r}; expected one of {', '.join(_KINDS)}")
    if kind == "top" and divergence != "forward":
        raise ValueError(f"linear_distillation: a short list leaves other ids without probability, {divergence!r} needs all of them")
    if not temperature > 0 or not (mix is None or 0 < mix < 1):
        raise ValueError("linear_distillation: the temperature must be positive and mix between 0 and 1")
    if reduction not in ("none", "mean", "sum") or gradients not in ("forward", "recompute"):
        raise ValueError(f"linear_distillation: unknown reduction {reduction!r} or schedule {gradients!r}")
    if mask is not None and (mask.shape != (rows,) or mask.dtype != torch.bool):
        raise ValueError(f"linear_distillation: mask must be bool [{rows}], got {mask.dtype} {tuple(mask.shape)}")
    if token_weights is not None and (token_weights.shape != (rows,) or not token_weights.is_floating_point()):
        raise ValueError(f"linear_distillation: token_weights must be floating [{rows}], got {tuple(token_weights.shape)}")
