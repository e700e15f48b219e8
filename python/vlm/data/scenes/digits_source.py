"""The address of drawn digits: `digits:?n=20000&seed=1&split=val&length=4&width=128&height=64`."""

from __future__ import annotations

from vlm.data.scenes.drawn import DrawnSource


class DigitsSource(DrawnSource):
    """Rows of `length` digits on width x height pixels. A number occurs in one split only, whatever the seed."""

    kind, name = "drawn digits", "digits"
    numbers = {"length": (4, 2, 64), "width": (128, 8, 4096), "height": (64, 8, 1024)}
