"""The address of drawn clips: `clips:?n=20000&seed=1&split=val&frames=8&size=32`."""

from __future__ import annotations

from vlm.data.scenes.drawn import DrawnSource


class ClipsSource(DrawnSource):
    """Clips of `frames` frames, each of size x size pixels. A colour and shape on a lane of the picture occur in one split only."""

    kind, name = "drawn clips", "clips"
    numbers = {"frames": (8, 1, 256), "size": (64, 8, 1024)}
