"""One chunk of vocabulary logits: its losses, and the gradient in its place, by the native core or in plain torch.

r rows of a chunk, V ids. The chunk is a contiguous buffer that the caller owns and overwrites.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlm.ops.backend import core


@dataclass(frozen=True)
class Shape:
    """What turns a chunk of products into a loss: label smoothing, weight of the squared log normaliser, cap (0: none)."""

    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float = 0.0


def cross_entropy_rows(
    chunk: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, shape: Shape, *, gradient: bool, native: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """chunk [r, V] products, labels [r] (-1: none) -> loss, log_p, lse, each [r]; with `gradient`, the chunk becomes
    that of `(factors * loss).sum()` by the products."""
    if not native:
        return _cross_entropy(chunk, bias, labels, factors, shape, gradient=gradient)
    loss, log_p, lse = (torch.empty(len(chunk)) for _ in range(3))
    core().cross_entropy_rows(
        rows=len(chunk), ids=chunk.shape[1], chunk=(chunk.data_ptr(), chunk.stride(0)), bias=_address(bias),
        labels=labels.data_ptr(), factors=_address(factors), smoothing=shape.smoothing, z_loss=shape.z_loss,
        softcap=shape.softcap, gradient=gradient, loss=loss.data_ptr(), log_p=log_p.data_ptr(), lse=lse.data_ptr(),
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return loss, log_p, lse


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _cross_entropy(
    z: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, shape: Shape, *, gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    labelled = labels >= 0
    column = labels.clamp(min=0)[:, None]
    if bias is not None:
        z.add_(bias)
    if shape.softcap:
        z.div_(shape.softcap).tanh_().mul_(shape.softcap)
    slope = 1 - (z / shape.softcap).square() if shape.softcap and gradient else None
    lse = z.logsumexp(1)
    own = z.gather(1, column)[:, 0]
    log_p = torch.where(labelled, own - lse, 0.0)
    loss = torch.where(labelled, lse - own, lse)
    smoothing = torch.where(labelled, shape.smoothing, 0.0).to(z.dtype)
    if shape.smoothing:
        loss = loss + torch.where(labelled, shape.smoothing * (own - z.mean(1)), 0.0)
    loss = loss + shape.z_loss * lse.square()
    if gradient:
        factor = torch.ones_like(lse) if factors is None else factors
        z.sub_(lse[:, None]).exp_().mul_((factor * (1 + 2 * shape.z_loss * lse))[:, None])
        if shape.smoothing:
            z.sub_((factor * smoothing / z.shape[1])[:, None])
        z.scatter_add_(1, column, torch.where(labelled, -factor * (1 - smoothing), 0.0)[:, None])
        if slope is not None:
            z.mul_(slope)
    return loss, log_p, lse


def divergence_rows(
    student: Tensor, teacher: Tensor, factors: Tensor | None, divergence: str, temperature: float, mix: float, *,
    gradient: bool, native: bool,
) -> Tensor:  # fmt: skip
    """student, teacher [r, V] logits -> the divergence of each row [r]; with `gradient`, the student's chunk becomes that of
    `(factors * value).sum()` by its logits. The teacher's chunk is not kept."""
    if not native:
        return _divergence(student, teacher, factors, divergence, temperature, mix, gradient=gradient)
    value = torch.empty(len(student))
    core().divergence_rows(
        rows=len(student), ids=student.shape[1], student=(student.data_ptr(), student.stride(0)),
        teacher=(teacher.data_ptr(), teacher.stride(0)), factors=_address(factors), kind=divergence, temperature=temperature,
        mix=mix, gradient=gradient, value=value.data_ptr(), threads=torch.get_num_threads(),
    )  # fmt: skip
    return value


def _divergence(
    student: Tensor, teacher: Tensor, factors: Tensor | None, divergence: str, temperature: float, mix: float, *, gradient: bool
) -> Tensor:
    absent = (student == -math.inf) | (teacher == -math.inf)
    # A row without a common id keeps all of them for the softmax; its terms are dropped.
    hidden = absent & ~absent.all(1, keepdim=True)
    s, t = (
        (x / temperature).masked_fill(absent, 0.0).masked_fill(hidden, -math.inf).log_softmax(1).masked_fill(absent, 0.0)
        for x in (student, teacher)
    )
    p, q = (x.exp().masked_fill(absent, 0.0) for x in (s, t))
    value, push = _terms(divergence, p, q, s, t, mix)
    value = value.masked_fill(absent, 0.0).sum(1)
    if gradient:
        push = push.masked_fill(absent, 0.0)
        factor = torch.ones_like(value) if factors is None else factors
        torch.mul(push - p * push.sum(1, keepdim=True), (factor / temperature)[:, None], out=student)
    return value


def _terms(divergence: str, p: Tensor, q: Tensor, s: Tensor, t: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    """The terms of a divergence, and p times their derivatives by p up to what is constant in a row."""

    def between(other: float) -> Tensor:
        """log((1 - other) Q + other S)"""
        return torch.logaddexp(t + math.log(1 - other), s + math.log(other))

    if divergence == "forward":
        return q * (t - s), -q
    if divergence == "reverse":
        return p * (s - t), p * (s - t)
    if divergence == "symmetric":
        return (mix * p - (1 - mix) * q) * (s - t), mix * p * (s - t) - (1 - mix) * q
    if divergence == "js":
        middle = between(mix)
        return (1 - mix) * q * (t - middle) + mix * p * (s - middle), mix * p * (s - middle)
    if divergence == "skew":
        middle = between(1 - mix)
        return q * (t - middle), -(1 - mix) * p * (t - middle).exp()
    return 0.5 * (p - q).abs(), 0.5 * p * (p - q).sign()
