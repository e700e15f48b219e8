"""A vision tower of clips: a vision transformer for each frame, and what joins the frames. Sources: core-crossframe, xclip.

The weights of the frames have the names of a `vit` tower; those that join frames are `across` and `integration`.
"""

from vlm.models.video.clips import Clips
from vlm.models.video.options import (
    DividedOptions,
    IntegrationOptions,
    MeanPoolOptions,
    MessageTokenOptions,
    TemporalOptions,
    VideoOptions,
)
from vlm.models.video.temporal import Divided, Integration, MessageToken
from vlm.models.video.tower import VideoTower

__all__ = [
    "Clips",
    "Divided",
    "DividedOptions",
    "Integration",
    "IntegrationOptions",
    "MeanPoolOptions",
    "MessageToken",
    "MessageTokenOptions",
    "TemporalOptions",
    "VideoOptions",
    "VideoTower",
]
