"""Measured cases of the contrastive losses and of late interaction."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.bench.case import Arm, Case, Work, with_backend

DENSE = "torch loss on all logits"
CHUNKED = "torch einsum of token scores, 8 pictures at a time"


def _arms(ours: Work, peer: Work) -> dict[Arm, Work]:
    return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}


def contrastive(form: str, batch: int, width: int = 512, half: bool = False) -> Callable[[], dict[Arm, Work]]:
    """x, y [B, E] unit rows, bfloat16 if `half`; loss and gradients of x, y, the scale, and the bias of form "sigmoid"."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(batch)
        sides = [F.normalize(torch.randn(batch, width, generator=generator), dim=1) for _ in range(2)]
        x, y = (side.to(torch.bfloat16 if half else torch.float32).requires_grad_() for side in sides)
        softmax = form == "softmax"
        log_scale = torch.tensor(2.659 if softmax else 2.303, requires_grad=True)
        bias = torch.tensor(-10.0, requires_grad=not softmax)
        leaves: list[Tensor] = [x, y, log_scale, *([] if softmax else [bias])]

        def ours() -> object:
            if softmax:
                rows, columns = ops.contrastive_softmax(x, y, log_scale)
                loss = (rows.mean() + columns.mean()) / 2
            else:
                loss = ops.contrastive_sigmoid(x, y, log_scale, bias)[0].mean()
            return torch.autograd.grad(loss, leaves)

        def peer() -> object:
            """As open_clip writes them: all logits, then cross_entropy twice, or logsigmoid of signed logits."""
            logits = log_scale.exp() * x.float() @ y.float().T
            if softmax:
                labels = torch.arange(batch)
                loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
            else:
                labels = 2 * torch.eye(batch) - torch.ones(batch)
                loss = -F.logsigmoid(labels * (logits + bias)).sum() / batch
            return torch.autograd.grad(loss, leaves)

        return _arms(ours, peer)

    return build


def taught(batch: int, width: int = 512, teacher_width: int = 256) -> Callable[[], dict[Arm, Work]]:
    """Softmax form with momentum targets: half the diagonal, half the softmax of a teacher's similarities, smoothed by 0.1."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(batch)
        x, y, a, b = (F.normalize(torch.randn(batch, n, generator=generator), dim=1)
                      for n in (width, width, teacher_width, teacher_width))
        log_scale = torch.tensor(2.659, requires_grad=True)
        leaves = [x.requires_grad_(), y.requires_grad_(), log_scale]

        def ours() -> object:
            rows, columns = ops.contrastive_softmax(x, y, log_scale, teacher=ops.Teacher(a, b, scale=14.3, share=0.5), smoothing=0.1)
            return torch.autograd.grad((rows.mean() + columns.mean()) / 2, leaves)

        def peer() -> object:
            logits, soft = log_scale.exp() * x @ y.T, 14.3 * a @ b.T
            own = torch.eye(batch)
            parts = [F.cross_entropy(z, 0.9 * (0.5 * own + 0.5 * u.softmax(1)) + 0.1 / batch)
                     for z, u in ((logits, soft), (logits.T, soft.T))]
            return torch.autograd.grad((parts[0] + parts[1]) / 2, leaves)

        return _arms(ours, peer)

    return build


def late(batch: int, patches: int, words: int, width: int) -> Callable[[], dict[Arm, Work]]:
    """FILIP's loss of unit tokens v [B, T, E] and w [B, U, E]; gradients of both and of the scale."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(batch)
        v, w = (F.normalize(torch.randn(batch, n, width, generator=generator), dim=2).requires_grad_() for n in (patches, words))
        log_scale = torch.tensor(2.659, requires_grad=True)
        labels = torch.arange(batch)

        def loss(rows: Tensor, columns: Tensor) -> object:
            z, t = log_scale.exp() * rows, log_scale.exp() * columns.T
            return torch.autograd.grad((F.cross_entropy(z, labels) + F.cross_entropy(t, labels)) / 2, [v, w, log_scale])

        def ours() -> object:
            return loss(*ops.late_interaction(v, w))

        def peer() -> object:
            """max keeps indices and not scores, so the scores of one chunk live at a time."""
            parts = [_maxima(part, w) for part in v.split(8)]
            return loss(torch.cat([rows for rows, _ in parts]), torch.cat([columns for _, columns in parts]))

        return _arms(ours, peer)

    return build


def _maxima(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("iae,jbe->ijab", v, w)
    return scores.max(3).values.mean(2), scores.max(2).values.mean(2)


_TARGETS = {8192: 2.0, 16384: 2.5}

CONTRASTIVE_CASES: tuple[Case, ...] = (
    *(
        Case(
            f"contrastive/{form}/{batch}/forward+backward",
            DENSE,
            contrastive(form, batch),
            _TARGETS.get(batch),
            peer_bytes=4 * 4 * batch * batch,  # about four matrices of logits live at once
        )
        for form in ("softmax", "sigmoid")
        for batch in (1024, 4096, 8192, 16384, 32768)
    ),
    *(Case(f"contrastive/{form}/65536/forward+backward", DENSE, contrastive(form, 65536), peer_bytes=16 * 65536**2)
      for form in ("softmax", "sigmoid")),
    Case("contrastive/softmax-bfloat16/8192/forward+backward", DENSE, contrastive("softmax", 8192, half=True),
         peer_bytes=16 * 8192**2),
    Case("contrastive/softmax-teacher/4096/forward+backward", DENSE, taught(4096), peer_bytes=32 * 4096**2),
    Case("late-interaction/64/forward+backward", CHUNKED, late(64, 64, 32, 256)),
    Case("late-interaction/256/forward+backward", CHUNKED, late(256, 64, 32, 256), 4.0),
)
