"""The bundle of a model that reads pictures and answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm.config.errors import CheckpointError
from vlm.runtime.generator import BundleGenerator
from vlm.runtime.manifest import REMEDY, Manifest
from vlm.runtime.session import CPU


class VisionLanguageBundle(BundleGenerator):
    """A `Generator` that reads pictures: towers and connector, embedding and decoder as graphs."""

    kind = "vision-language"

    def __init__(
        self, directory: Path, manifest: Manifest, *, threads: int | None, batch_size: int = 32, providers: Sequence[str] = (CPU,)
    ) -> None:
        super().__init__(directory, manifest, threads=threads, batch_size=batch_size, providers=providers)
        if not self.writes or not self._streams or self.image_id is None:
            raise CheckpointError("decoder, pictures or text.image_id are missing", where=self.where, remedy=REMEDY)
        self.stepper()  # a graph that cannot be opened is said now
