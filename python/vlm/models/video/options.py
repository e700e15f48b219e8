"""The table of a tower of clips."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.models.towers import TowerOptions, VitOptions


class MeanPoolOptions(Options):
    """No frame sees another inside the tower."""

    kind: Literal["mean-pool"] = "mean-pool"


class MessageTokenOptions(Options):
    """In every block one message of each frame's class token goes to all frames, then joins the tokens of its own frame
    (xclip). Messages have no positions: the blocks do not know the order of frames."""

    kind: Literal["message-token"] = "message-token"


class DividedOptions(Options):
    """In every block each position of the grid attends itself in all frames, then the positions of a frame one another."""

    kind: Literal["divided"] = "divided"
    positions: bool = Field(True, description="a learned vector of each frame's number, added before the first block; zero at first")
    zero_init: bool = Field(True, description="attention over frames begins at zero: a fresh tower is that of single frames")


TemporalOptions = Annotated[MeanPoolOptions | MessageTokenOptions | DividedOptions, Field(discriminator="kind")]
"""The catalogue of `vision.temporal`."""


class IntegrationOptions(Options):
    """The head that makes one vector of the vectors of a clip's frames: mean of c + transformer(c + positions)."""

    layers: int = Field(1, ge=0, description="blocks over the frames; 0: the plain mean of their vectors")
    positions: bool = Field(True, description="a learned vector of each frame's number; without, the order of frames changes nothing")
    heads: int | None = Field(None, gt=0, description="attention heads; default: one for 64 channels")


class VideoOptions(TowerOptions):
    """A vision transformer over clips: the pictures of a sample, in order."""

    kind: Literal["video"] = "video"
    image_size: int = Field(gt=0, description="side of a frame in pixels")
    patch_size: int = Field(gt=0, description="side of a patch in pixels")
    class_token: bool = Field(True, description="prepend a learned token")
    patch_bias: bool = Field(False, description="bias in the patch embedding")
    pre_norm: bool = Field(True, description="layer norm before the first block")
    pool: Literal["cls", "mean", "attention"] = Field("cls", description="how the tokens of a frame become one vector")
    frames: int = Field(8, gt=0, description="most frames of a clip; of a longer one as many are read, evenly spaced")
    temporal: TemporalOptions = MessageTokenOptions()
    integration: IntegrationOptions = IntegrationOptions()

    @model_validator(mode="after")
    def _message_of_a_class_token(self) -> VideoOptions:
        if isinstance(self.temporal, MessageTokenOptions) and not self.class_token:
            raise ValueError('temporal.kind "message-token" needs class_token')
        if self.pool == "cls" and not self.class_token:
            raise ValueError('pool "cls" needs class_token')
        return self

    @property
    def patches(self) -> int:
        """Patches of a frame."""
        return (self.image_size // self.patch_size) ** 2

    def vit(self) -> VitOptions:
        """The tower of one frame."""
        shared = {name: getattr(self, name) for name in VitOptions.model_fields if name in type(self).model_fields and name != "kind"}
        return VitOptions(**shared)
