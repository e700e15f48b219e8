"""Base of every options class: what one TOML table may say.

An options class is the schema of one table of a preset. It is frozen, refuses unknown keys, and documents each
field with `Field(description=...)`, which `vlm presets explain` prints.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """A frozen, strict table of settings.

    Raises pydantic's ValidationError; `vlm.config` turns it into a `PresetError` that names file, line and column.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())
