"""Exponential moving average of the weights, evaluated and saved in place of the last ones. Sources: s3a, ctp."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vlm.types.state import Tree


class WeightAverage:
    """average <- decay average + (1 - decay) weights; the decay rises from 0 as (1 + n) / (10 + n)."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                self.tensors[name].lerp_(tensor, 1 - decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with averaged weights for the time of the block."""
        own = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        model.load_state_dict(self.tensors)
        try:
            yield
        finally:
            model.load_state_dict(own)

    def state_dict(self) -> Tree:
        return {"updates": self.updates, "tensors": dict(self.tensors)}

    def load_state_dict(self, state: Tree) -> None:
        self.updates = int(state["updates"])
        for name, tensor in state["tensors"].items():
            own: Tensor = self.tensors[name]
            own.copy_(tensor)
