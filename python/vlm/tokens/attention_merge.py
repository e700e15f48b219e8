"""What goes is merged into what stays by attention under a policy. Source: core-select (the token merger of LaVIT).

P pictures, N tokens of a picture, C width, H heads, D head width. The policy is a tensor that carries a gradient, so this is
plain torch: the kernels of `vlm.ops.attention` take no weights on keys.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.config.options import Options

EPS = 1e-6


class AttentionMergeOptions(Options):
    """Blocks in which the kept tokens attend one another, and every token those that go; then the kept ones are gathered."""

    kind: Literal["attention-merge"] = "attention-merge"
    depth: int = Field(12, ge=1, description="number of blocks")
    heads: int = Field(8, ge=1, description="attention heads; they divide the width")
    ffn_ratio: float = Field(4.0, gt=0, description="feed-forward width over width")
    causal: bool = Field(True, description="a kept token sees those before it, as a language model will; false: all")


class PolicyAttention(nn.Module):
    """Multi-head attention whose keys count by a policy."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, context: Tensor, policy: Tensor, allowed: Tensor | None = None) -> Tensor:
        """x [P, N, C] reads context [P, M, C] by policy [P, N or 1, M]; allowed bool [N, M], None: all."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q(x), self.k(context), self.v(context))
        )
        logits = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
        weights = policy_softmax(logits, policy[:, None], allowed).to(v.dtype)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class MergeBlock(nn.Module):
    """Self-attention among the kept tokens, attention of every token to those that go, feed-forward; all residual."""

    def __init__(self, options: AttentionMergeOptions, width: int) -> None:
        super().__init__()
        hidden = round(width * options.ffn_ratio)
        self.causal = options.causal
        self.norm1, self.norm2, self.norm_context, self.norm3 = (nn.LayerNorm(width) for _ in range(4))
        self.among, self.across = PolicyAttention(width, options.heads), PolicyAttention(width, options.heads)
        self.ffn = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, original: Tensor, keep: Tensor) -> Tensor:
        """x, original [P, N, C], keep [P, N] -> [P, N, C]."""
        n = x.shape[1]
        own = torch.eye(n, dtype=keep.dtype, device=keep.device)
        policy = keep[:, None] + (1 - keep[:, None]) * own  # and every token sees itself
        allowed = torch.ones(n, n, dtype=torch.bool, device=keep.device).tril() if self.causal else None
        y = self.norm1(x)
        x = x + self.among(y, y, policy, allowed)
        x = x + self.across(self.norm2(x), self.norm_context(original), 1 - keep[:, None])
        return x + self.ffn(self.norm3(x))


class AttentionMerge(nn.Module):
    """All tokens after the blocks; the caller gathers those that stay."""

    def __init__(self, options: AttentionMergeOptions, width: int) -> None:
        """Raises ValueError where the heads do not divide the width."""
        super().__init__()
        if width % options.heads:
            raise ValueError(f"attention-merge: {options.heads} heads do not divide the width {width}")
        self.blocks = nn.ModuleList(MergeBlock(options, width) for _ in range(options.depth))

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        """x [P, N, C], keep [P, N] of 1 and 0 with a gradient -> [P, N, C]."""
        original = x
        for block in self.blocks:
            x = block(x, original, keep.to(torch.float32))
        return x


def policy_softmax(logits: Tensor, policy: Tensor, allowed: Tensor | None = None) -> Tensor:
    """(e + eps / n) / (sum e + eps) with e = exp(logits - their maximum) * policy, over the last axis.

    logits [..., N, M]; policy broadcastable to it, 0 to 1; allowed bool [N, M], None: all: keys that are not allowed get
    exactly 0. The maximum is over all allowed keys, n is their number in the row. Rows sum to 1; where the policy is 0
    throughout they are uniform over the allowed keys. Differentiable in both.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -torch.inf)
    count = logits.shape[-1] if allowed is None else allowed.sum(-1, keepdim=True).clamp(min=1)
    peak = logits.detach().amax(-1, keepdim=True) if logits.shape[-1] else logits.new_zeros(*logits.shape[:-1], 1)
    e = (logits - peak).exp() * policy
    smooth = EPS / count if allowed is None else allowed.to(e.dtype) * (EPS / count)
    return (e + smooth) / (e.sum(-1, keepdim=True) + EPS)
