"""Base of every options class: what one TOML table may say.

An options class is the schema of one table of a preset. It is frozen, refuses unknown keys, and documents each
field with `Field(description=...)`, which `vlm presets explain` prints.
"""

from __future__ import annotations

from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator


class Options(BaseModel):
    """A frozen, strict table of settings.

    Raises pydantic's ValidationError; `vlm.config` turns it into a `PresetError` that names file, line and column.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _none_by_name(cls, values: Any) -> Any:
        """TOML has no null: the word "none" empties a field that may be empty."""
        if not isinstance(values, dict) or "none" not in values.values():
            return values
        optional = {name for name, field in cls.model_fields.items() if NoneType in get_args(field.annotation)}
        return {name: None if value == "none" and name in optional else value for name, value in values.items()}

    def read_only_where(self, holds: bool, condition: str, *names: str) -> None:
        """Raises ValueError for one of the settings `names` that says something, though `condition`, under which alone it is
        read, does not hold. A default says nothing."""
        for name in () if holds else names:
            if getattr(self, name) != type(self).model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"{name} is read only where {condition}: set that, or leave {name} out")
