"""What a preset may say of a companion: where it comes from, how it follows the model, when a copy is taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from vlm.config.options import Options

STAGE = "stage:"
"""How a source names the final weights of a stage."""


class EmaUpdate(Options):
    """theta_m <- decay theta_m + (1 - decay) theta after every update."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.999, ge=0, le=1)


class ThreeWayUpdate(Options):
    """theta_m <- decay theta_m + (1 - decay) / 2 (theta + theta_ref) after every update. Source: ctp."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, populate_by_name=True)

    kind: Literal["three-way"]
    decay: float = Field(0.9, ge=0, le=1)
    with_: str = Field(alias="with", description="the companion that is theta_ref; it must be frozen")


class LiveUpdate(Options):
    """The model itself, as it is before the update: no copy, no gradient, no dropout."""

    kind: Literal["live"]


CompanionUpdate = Annotated[EmaUpdate | ThreeWayUpdate | LiveUpdate, Field(discriminator="kind")]


class CompanionOptions(Options):
    """One table [companions.NAME]."""

    source: str = Field(
        description='a model directory, the key of a preset, "model" for the model itself, or "stage:NAME" for what that stage ended with'
    )
    update: CompanionUpdate | None = Field(None, description="how it follows the model; none: frozen")
    adapter: Literal["off"] | None = Field(None, description="off: the model itself without its adapters")
    refresh: Literal["stage", "run"] = Field("stage", description="a copy of the model is taken when each stage begins, or once a run")
    cache: bool = Field(False, description="keep its embeddings on disk, keyed by its weights and the sample; needs unaugmented data")

    @property
    def live(self) -> bool:
        """Whether it is the model itself."""
        return self.adapter is not None or isinstance(self.update, LiveUpdate)

    @property
    def copied(self) -> bool:
        """Whether it is a copy of the model."""
        return self.source == "model" and not self.live

    @property
    def stage(self) -> str | None:
        """The stage whose final weights it has; None for another source."""
        return self.source.removeprefix(STAGE) if self.source.startswith(STAGE) else None

    @model_validator(mode="after")
    def _possible(self) -> CompanionOptions:
        if self.live and self.source != "model":
            raise ValueError('a live companion, or one with adapter = "off", is the model itself: source must be "model"')
        if self.adapter is not None and not isinstance(self.update, LiveUpdate | None):
            raise ValueError('adapter = "off" is the model itself and follows it already: leave update out')
        if self.refresh == "run" and not self.copied:
            raise ValueError('refresh says when a copy of the model is taken: it needs source = "model" and no live companion')
        if self.cache and (self.live or self.update is not None):
            raise ValueError("cache keeps what fixed weights say, and the weights of this companion change")
        return self
