"""The optimiser of a stage: parameter groups by pattern, state saved by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from vlm.config.options import Options
from vlm.tuning import RatePattern
from vlm.types.state import Tree


class OptimizerOptions(Options):
    """AdamW (fused) or SGD. Vectors and scalars (norms, biases, temperatures) are not decayed."""

    kind: Literal["adamw", "sgd"] = "adamw"
    lr: float = Field(1e-3, gt=0, description="base learning rate")
    weight_decay: float = Field(0.1, ge=0)
    betas: tuple[float, float] = Field((0.9, 0.98), description="adamw: decay of the two moments")
    eps: float = Field(1e-6, gt=0, description="adamw only")
    momentum: float = Field(0.9, ge=0, description="sgd only")
    reset: bool = Field(False, description="a stage begins with a new optimiser instead of the moments of the stage before")

    @model_validator(mode="after")
    def _of_its_kind(self) -> OptimizerOptions:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {list(self.betas)}, expected two numbers from 0 to below 1")
        self.read_only_where(self.kind == "adamw", 'kind = "adamw"', "betas", "eps")
        self.read_only_where(self.kind == "sgd", 'kind = "sgd"', "momentum")
        return self


class NamedOptimizer:
    """A torch optimiser over named parameters; groups differ in rate factor and weight decay."""

    def __init__(self, options: OptimizerOptions, named: Mapping[str, nn.Parameter], rates: Sequence[RatePattern]) -> None:
        self.options = options
        self.base_rate = options.lr
        self.named = dict(named)
        groups: dict[tuple[float, float], list[str]] = {}
        for name, parameter in self.named.items():
            factor, decay = 1.0, options.weight_decay if parameter.dim() >= 2 else 0.0
            for rate in rates:
                if fnmatchcase(name, rate.pattern):
                    factor = rate.factor
                    decay = decay if rate.weight_decay is None else rate.weight_decay
            groups.setdefault((factor, decay), []).append(name)
        self.groups = groups
        tables: list[dict[str, Any]] = [
            {"params": [self.named[n] for n in names], "weight_decay": decay, "factor": factor, "lr": options.lr * factor}
            for (factor, decay), names in groups.items()
        ]
        self.torch: torch.optim.Optimizer
        if options.kind == "adamw":
            self.torch = torch.optim.AdamW(tables, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
        else:
            self.torch = torch.optim.SGD(tables, lr=options.lr, momentum=options.momentum, fused=True)

    def step(self, factor: float) -> None:
        """One update at `factor` times the base rates."""
        for group in self.torch.param_groups:
            group["lr"] = self.base_rate * group["factor"] * factor
        self.torch.step()

    def zero_grad(self) -> None:
        self.torch.zero_grad(set_to_none=True)

    def state_dict(self) -> Tree:
        """name -> {moment name -> tensor}"""
        out: Tree = {}
        for name, parameter in self.named.items():
            slots = self.torch.state.get(parameter, {})
            out[name] = {key: value for key, value in slots.items() if value is not None}
        return out

    def load_state_dict(self, state: Tree) -> None:
        for name, slots in state.items():
            own = self.torch.state[self.named[name]]
            own.clear()
            own.update({key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in slots.items()})
