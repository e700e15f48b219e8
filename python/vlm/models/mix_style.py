"""Pictures with the style of others: feature statistics mixed between the pictures of a batch, in training alone. Source: syvic (MixStyle).

B pictures, N tokens, C channels.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from vlm.config.options import Options


class MixStyleOptions(Options):
    """`[model.vision.mix_style]`: patch embeddings get a mean and deviation between their own and those of another picture of the same
    micro-batch, so drawn and real pictures of a mixture lend each other their look. What stands where stays."""

    p: float = Field(0.5, gt=0, le=1, description="how likely a picture is mixed")
    alpha: float = Field(0.1, gt=0, description="of Beta(alpha, alpha), from which its own share is drawn: small, mostly one of the two")
    eps: float = Field(1e-6, gt=0, description="added to the variance")


def mix_statistics(x: Tensor, order: Tensor, own: Tensor, eps: float = 1e-6) -> Tensor:
    """x [B, N, C] with, of each channel, the mean and deviation over tokens own * (its own) + (1 - own) * (those of x[order]).

    order [B] int64, own [B] in 0..1; own = 1 is x, bit for bit. Statistics carry no gradient.
    """
    wide = x.float()
    variance, mean = torch.var_mean(wide.detach(), dim=1, correction=0, keepdim=True)
    deviation = (variance + eps).sqrt()
    share = own.to(wide)[:, None, None]
    new_mean = share * mean + (1 - share) * mean[order]
    scale = (share * deviation + (1 - share) * deviation[order]) / deviation
    return (wide * scale + (new_mean - mean * scale)).to(x.dtype)


def drawn_mix(x: Tensor, options: MixStyleOptions) -> Tensor:
    """`mix_statistics` with draws of torch's generator of the processor, which a replay of the step repeats."""
    count = len(x)
    order = torch.randperm(count)
    gamma = torch._standard_gamma(torch.full((2, count), options.alpha, dtype=torch.float64))
    own = gamma[0] / gamma.sum(0).clamp(min=torch.finfo(torch.float64).tiny)
    own = torch.where(torch.rand(count) < options.p, own, 1.0)
    return mix_statistics(x, order.to(x.device), own.to(x.device), options.eps)
