"""Losses over the vocabulary in plain torch: the twins of the chunked operators. They hold all logits [N, V].

N rows, C width, V ids. Made of exportable operators.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal["forward", "reverse", "symmetric", "js", "skew", "tv"]

MIX = {"symmetric": 0.9, "js": 0.9, "skew": 0.1}
"""Defaults of `mix` (llava-kd); the other divergences have none."""


class CrossEntropy(NamedTuple):
    """loss: [N], or a scalar where it was reduced. log_p [N]: log-probability of the label. lse [N]: logsumexp of the logits.

    Only `loss` has gradients. An ignored row has 0 in all three.
    """

    loss: Tensor
    log_p: Tensor
    lse: Tensor


def _wide(hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float) -> Tensor:
    z = hidden @ weight.T
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if bias is not None:
        z = z + bias
    return softcap * torch.tanh(z / softcap) if softcap else z


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    allowed: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> CrossEntropy:
    """Same contract as `vlm.ops.linear_cross_entropy` with reduction "none"; a label that is not allowed gives inf."""
    valid = labels != ignore_index
    z = _wide(torch.where(valid[:, None], hidden, torch.zeros_like(hidden)), weight, bias, softcap)
    if allowed is not None:
        z = z.masked_fill(~allowed, -math.inf)
    lse = torch.logsumexp(z, 1)
    own = z.gather(1, torch.where(valid, labels, torch.zeros_like(labels))[:, None])[:, 0]
    loss = lse - own
    if smoothing:
        mean = z.mean(1) if allowed is None else torch.where(allowed, z, torch.zeros_like(z)).sum(1) / allowed.sum()
        loss = loss + smoothing * (own - mean)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if token_weights is not None:
        loss = loss * torch.where(valid, token_weights, torch.zeros_like(token_weights))
    nothing = torch.zeros_like(loss)
    outputs = (torch.where(valid, t, nothing) for t in (loss, (own - lse).detach(), lse.detach()))
    return CrossEntropy(*outputs)


def divergence_reference(
    student: Tensor, teacher: Tensor, *, divergence: Divergence = "forward", temperature: float = 1.0, mix: float | None = None
) -> Tensor:
    """student [N, V], teacher [N, W] logits -> [N]: how far the softmaxes S and Q are apart; 0 where they are equal.

    forward: KL(Q || S). reverse: KL(S || Q). symmetric: (1 - mix) forward + mix reverse.
    js: (1 - mix) KL(Q || M) + mix KL(S || M) with M = (1 - mix) Q + mix S. tv: half the sum of |Q - S|.
    skew: KL(Q || mix Q + (1 - mix) S). Both logits are divided by the temperature; the value is not scaled back.
    Ids that either lacks, beyond the smaller vocabulary or at -inf, are left out of both.
    """
    size = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[..., :size], teacher[..., :size]
    absent = (student == -math.inf) | (teacher == -math.inf)
    # With no id in common at all, the row is left whole and its terms are dropped below.
    hidden = absent & ~absent.all(-1, keepdim=True)
    logs = [
        torch.where(absent, torch.zeros_like(x), x / temperature).masked_fill(hidden, -math.inf).log_softmax(-1)
        for x in (student, teacher)
    ]
    # An absent id has probability 0; its logarithm is never used and must not make 0 * inf.
    s, t = (x.masked_fill(absent, 0.0) for x in logs)
    p, q = (x.exp().masked_fill(absent, 0.0) for x in (s, t))
    share = MIX.get(divergence, 0.0) if mix is None else mix

    def between(other: float) -> Tensor:
        """log((1 - other) Q + other S)"""
        return torch.logaddexp(t + math.log(1 - other), s + math.log(other))

    if divergence == "forward":
        values = q * (t - s)
    elif divergence == "reverse":
        values = p * (s - t)
    elif divergence == "symmetric":
        values = (1 - share) * q * (t - s) + share * p * (s - t)
    elif divergence == "js":
        middle = between(share)
        values = (1 - share) * q * (t - middle) + share * p * (s - middle)
    elif divergence == "tv":
        values = 0.5 * (q - p).abs()
    else:
        values = q * (t - between(1 - share))
    return values.masked_fill(absent, 0.0).sum(-1)


def linear_distillation_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher_logits: Tensor,
    teacher_ids: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    divergence: Divergence = "forward",
    temperature: float = 1.0,
    mix: float | None = None,
    mask: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Same contract as `vlm.ops.linear_distillation` with reduction "none", the teacher's logits given: [N, W], or [N, K] of the
    ids `teacher_ids` [N, K]."""
    valid = torch.ones(hidden.shape[0], dtype=torch.bool, device=hidden.device) if mask is None else mask
    student = _wide(torch.where(valid[:, None], hidden, torch.zeros_like(hidden)), weight, bias, softcap)
    teacher = torch.where(valid[:, None], teacher_logits, torch.zeros_like(teacher_logits)).to(student.dtype)
    if teacher_ids is None:
        values = divergence_reference(student, teacher, divergence=divergence, temperature=temperature, mix=mix)
    else:
        ids = torch.where(valid[:, None], teacher_ids, torch.zeros_like(teacher_ids))
        t = (teacher / temperature).log_softmax(1)
        values = (t.exp() * (t - (student / temperature).log_softmax(1).gather(1, ids))).sum(1)
    if token_weights is not None:
        values = values * torch.where(valid, token_weights, torch.zeros_like(token_weights))
    return torch.where(valid, values, torch.zeros_like(values))
