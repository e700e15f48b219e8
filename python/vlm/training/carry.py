"""What one stage leaves to the next ones, besides the weights of the model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from vlm.training.companions import Companions
from vlm.training.optimizer import NamedOptimizer
from vlm.tuning import merged_state, plain_name
from vlm.types.state import Tree


@dataclass
class Carried:
    """objectives: states by name, of objectives that the running stage has not. companions: weights, without adapters, of
    copies taken once a run that the running stage has not. stages: name -> file and SHA-256 of final weights that a later
    stage names. optimizer: moments by plain parameter name, between two stages only.
    """

    objectives: dict[str, dict[str, Any]] = field(default_factory=dict)
    companions: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    stages: dict[str, dict[str, str]] = field(default_factory=dict)
    optimizer: dict[str, Tree] = field(default_factory=dict)
    optimizer_kind: str = ""

    def take(self, objectives: nn.ModuleDict, companions: Companions, optimizer: NamedOptimizer) -> None:
        """What a stage that has ended leaves."""
        for name, objective in objectives.items():
            self.objectives[name] = _copies(objective.state_dict())
        for name, member in companions.members.items():
            if member.lasting:
                self.companions[name] = _copies(merged_state(member.model))
        # Adapters end with their stage: they are in the weights now, and those of the next one are new.
        self.optimizer = {plain_name(name): slots for name, slots in optimizer.state_dict().items() if ".lora_" not in name}
        self.optimizer_kind = optimizer.options.kind

    def give(self, objectives: nn.ModuleDict, companions: Companions, optimizer: NamedOptimizer) -> None:
        """Hand a stage that begins what is its own by name and shape; it is the stage's from here on."""
        for name, objective in objectives.items():
            _fill(objective, self.objectives.pop(name, {}))
        for name, member in companions.members.items():
            if member.lasting:
                self.companions.pop(name, None)  # its weights came in when it was made
        if not optimizer.options.reset and optimizer.options.kind == self.optimizer_kind:
            give_moments(optimizer, self.optimizer)
        self.optimizer = {}

    def state_dict(self) -> Tree:
        """For a checkpoint inside a stage, where the optimiser has its moments again."""
        return {"objectives": dict(self.objectives), "companions": dict(self.companions), "stages": dict(self.stages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """From a checkpoint; one of a release that carried nothing holds none of it."""
        self.objectives, self.companions = dict(state.get("objectives", {})), dict(state.get("companions", {}))
        self.stages = dict(state.get("stages", {}))


def give_moments(optimizer: NamedOptimizer, moments: Mapping[str, Tree]) -> None:
    """The moments of parameters that the optimiser has too, by name and shape; the others begin without."""
    own = {}
    for name, parameter in optimizer.named.items():
        slots = moments.get(plain_name(name), {}) if ".lora_" not in name else {}
        shaped = [slot for slot in slots.values() if isinstance(slot, Tensor) and slot.dim()]
        if slots and all(slot.shape == parameter.shape for slot in shaped):
            own[name] = slots
    optimizer.load_state_dict(own)


def _copies(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value) for name, value in state.items()}


def _fill(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Copy what has the same name and, for a tensor, the same shape."""
    own = module.state_dict()
    module.load_state_dict(
        {name: state[name] if name in state and _shape(state[name]) == _shape(value) else value for name, value in own.items()}
    )


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else type(value)
