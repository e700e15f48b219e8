"""Pieces of a stage that follow from its tables: what learns, its objectives, its length."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from vlm.config.errors import RequestError
from vlm.models import Model
from vlm.objectives import BuildContext
from vlm.training.preset import Stage
from vlm.tuning import TuningOptions, plain_name, trainable
from vlm.tuning.prompt import CONTEXT

OBJECTIVES = "objectives."
"""How the names of objectives' parameters begin in patterns."""


def choose_trainable(model: Model, tuning: TuningOptions) -> None:
    """requires_grad by the patterns; with LoRA or a learned prompt only what these add and `freeze` spares (and what `train`
    names besides) learns."""
    plain = {name: plain_name(name) for name, _ in model.named_parameters()}
    freeze = [pattern for pattern in tuning.freeze if not pattern.startswith(OBJECTIVES)]
    chosen = set(trainable([n for n in plain.values() if ".lora_" not in n], tuning.train, freeze))
    adds = tuning.lora is not None or tuning.prompt is not None
    named = set() if adds and tuning.train == ("*",) else chosen
    for name, parameter in model.named_parameters():
        added = ".lora_" in name or (tuning.prompt is not None and name == CONTEXT)
        spared = added and not any(fnmatchcase(name, pattern) for pattern in freeze)
        parameter.requires_grad_(spared or plain[name] in named)


def freeze_objectives(objectives: nn.ModuleDict, tuning: TuningOptions) -> None:
    """Parameters of objectives learn, but those that `tuning.freeze` names. Raises RequestError for a pattern that matches none."""
    named = {f"{OBJECTIVES}{name}": parameter for name, parameter in objectives.named_parameters()}
    for pattern in tuning.freeze:
        if pattern.startswith(OBJECTIVES):
            found = [parameter for name, parameter in named.items() if fnmatchcase(name, pattern)]
            if not found:
                known = f"parameters of objectives: {', '.join(named) or 'none'}"
                raise RequestError(f"tuning pattern {pattern!r} matches no parameter", remedy=known)
            for parameter in found:
                parameter.requires_grad_(False)


def check_rates(model: Model, objectives: nn.ModuleDict, tuning: TuningOptions) -> None:
    """Raises RequestError for a pattern of `tuning.rates` that no parameter has, trained or not: its rate would be said in vain."""
    names = [name for name, _ in model.named_parameters()]
    names += [*map(plain_name, names), *(f"{OBJECTIVES}{name}" for name, _ in objectives.named_parameters())]
    for rate in tuning.rates:
        if not any(fnmatchcase(name, rate.pattern) for name in names):
            some = ", ".join(names[:: max(1, len(names) // 5)][:5])
            raise RequestError(f"tuning.rates: {rate.pattern!r} matches no parameter", remedy=f"parameters are called like {some}")


def build_objective(options: Any, context: BuildContext) -> nn.Module:
    """Raises RequestError, naming the objective, for what cannot be built."""
    try:
        return options.build(context)
    except (ValueError, AttributeError) as error:
        raise RequestError(f"objective {options.name!r} cannot be built: {error}") from error


def steps_of(stage: Stage, samples: int | None) -> int:
    """Updates of a stage. samples: of one pass over its data; None where that is not known."""
    if stage.train.steps is not None:
        return stage.train.steps
    if samples is None:
        raise RequestError("train.epochs needs a source of known length", remedy="give train.steps")
    assert stage.train.epochs is not None
    return max(1, round(stage.train.epochs * samples / stage.train.batch_size))
