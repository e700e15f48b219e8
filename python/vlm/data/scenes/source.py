"""The address of drawn scenes: `scenes:?n=20000&seed=1&split=val&size=64&yes=75&objects=4`."""

from __future__ import annotations

from vlm.data.scenes.drawn import DrawnSource
from vlm.data.scenes.layout import MOST_OBJECTS


class ScenesSource(DrawnSource):
    """Scenes of size x size pixels. A composition occurs in one split only, whatever the seed.

    yes: percent of the yes-no questions that are answered by yes (debias-lvlm needs a skewed set). objects: most of a scene.
    """

    kind, name = "drawn scenes", "scenes"
    numbers = {"size": (64, 8, 1024), "yes": (50, 0, 100), "objects": (MOST_OBJECTS, 1, MOST_OBJECTS)}
