"""Activations by the name that a preset gives them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "identity"]


def activation_of(kind: Activation) -> nn.Module:
    """The activation named in a preset; quick_gelu is x * sigmoid(1.702 x)."""
    if kind == "quick_gelu":
        return QuickGelu()
    return {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "identity": nn.Identity()}[kind]


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), the activation of the published CLIP weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)
