"""A torch model as evaluation runs it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode in float32 without gradients, on the model's device; its own mode comes back afterwards."""
    import torch

    device = next(model.parameters()).device
    training = model.training
    # Asked for every token that is written: setting the mode of all modules costs more than looking at it.
    changes = any(module.training for module in model.modules())
    if changes:
        model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield device
    finally:
        if changes:
            model.train(training)
