"""A trained model with other settings of its token reduction: these have no weights, so it is the same model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pydantic

from vlm.config.errors import RequestError

if TYPE_CHECKING:
    from vlm.models import Model


def with_settings(model: Model, settings: Mapping[str, Any]) -> Model:
    """A model of the same weights whose options differ at the paths of `settings`: `tokens.keep` -> a table, a list, a number.

    A path may step into a list by number: `tokens.pre.0.select.ratio`. Raises RequestError for a path or value that the
    options do not take, and for one that changes what has weights.
    """
    options: Any = model.options
    values = options.model_dump(mode="json")
    for path, value in settings.items():
        _put(values, path.split("."), value, path)
    try:
        changed = type(options).model_validate(values)
        other: Model = changed.build(model.vocabulary)
    except (pydantic.ValidationError, ValueError) as error:
        told = error.errors()[0] if isinstance(error, pydantic.ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, told["loc"]))
        raise RequestError(f"{', '.join(settings)}: {where + ': ' if where else ''}{told['msg']}") from error
    state = model.state_dict()
    own = {name: tuple(t.shape) for name, t in other.state_dict().items()}
    if own != {name: tuple(t.shape) for name, t in state.items()}:
        raise RequestError(
            f"{', '.join(settings)} changes weights, and the model has its own", remedy="change what reduces tokens: tokens.*, merge.*"
        )
    other.load_state_dict(state)
    return other.eval()


def _put(values: Any, steps: list[str], value: Any, path: str) -> None:
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        if isinstance(values, list):
            if not step.isdigit() or int(step) >= len(values):
                raise RequestError(f"{path}: there is no entry {step} among {len(values)}")
            key: Any = int(step)
        elif isinstance(values, dict):
            key = step
            if not last and values.get(key) is None:
                values[key] = {}
        else:
            raise RequestError(f"{path}: {'.'.join(steps[:number])} has nothing inside")
        if last:
            values[key] = value
        else:
            values = values[key]
