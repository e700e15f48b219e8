"""The bundle of a vision model: pictures to vectors, and to class logits where it has a head.

n pictures, E width, K classes, S side of the model's input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, cast

import numpy as np

from vlm.config.errors import GateFailed, RequestError
from vlm.runtime.embedder import Form, Picture, normalise
from vlm.runtime.manifest import MANIFEST, Manifest, golden_of, inside
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits, as_rgb
from vlm.runtime.session import CPU, open_graph


class VisionBundle:
    """A `PreparingEmbedder` without texts. classes: names of the columns of `classify`; none: no head."""

    kind = "vision"
    scale = 1.0
    bias = 0.0
    form: Form = "softmax"

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int | None, batch_size: int, providers: Sequence[str]) -> None:
        where = str(directory / MANIFEST)
        self.directory, self.manifest, self.name, self.batch_size = directory, manifest, manifest.name, batch_size
        self.width = manifest.count("embedding", "width", where)
        self.classes: tuple[str, ...] = tuple(map(str, manifest.require("head", "classes", list, where)))
        self._sessions = {
            name: open_graph(directory, manifest, name, threads, providers if name != "preprocess" else (CPU,))
            for name in ("preprocess", "vision")
        }

    def prepare_image(self, picture: Picture, limits: PictureLimits = DEFAULT_LIMITS) -> np.ndarray:
        """float32 [3, S, S], normalised, by the bundle's own preprocessing graph. Raises BadPicture."""
        rgb = as_rgb(picture, limits)
        return cast(np.ndarray, self._sessions["preprocess"].run(["pixel_values"], {"picture": np.asarray(rgb)})[0])

    def encode_pixels(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared pictures [3, S, S] to [n, E] float32, unit length."""
        return normalise(self._run(pixels, "embedding", self.width))

    def encode_image(self, pictures: Sequence[Picture]) -> np.ndarray:
        """[n, E] float32, unit length. Raises BadPicture for the first picture that is refused."""
        return self.encode_pixels([self.prepare_image(picture) for picture in pictures])

    def encode_text(self, texts: Sequence[str]) -> NoReturn:
        """Raises RequestError: there is no text tower."""
        raise RequestError("a vision model reads no texts", remedy="give the bundle of a dual encoder")

    def classify(self, pictures: Sequence[Picture]) -> np.ndarray:
        """[n, K] float32 logits. Raises RequestError for a bundle without classes, BadPicture."""
        if not self.classes:
            raise RequestError("this model has no classes of its own", remedy="export a model that was trained with model.classes")
        return self._run([self.prepare_image(picture) for picture in pictures], "logits", len(self.classes))

    def self_test(self) -> float:
        """Embed the golden pictures and compare with what the training framework gave: the lowest cosine, of vectors and
        of logits. Raises GateFailed when it is below the bundle's stated tolerance."""
        limit = self.manifest.tolerance("cosine", 0.9999, str(self.directory / MANIFEST))
        lowest = 1.0
        with golden_of(self.directory) as golden:
            pictures = [str(inside(self.directory, f"golden/{name}")) for name in golden["pictures"]]
            pairs = [(self.encode_image(pictures), golden["image_embeddings"])]
            if self.classes:
                pairs.append((self.classify(pictures), golden["logits"]))
            for got, wanted in pairs:
                cosines = (normalise(got) * normalise(np.asarray(wanted, np.float32))).sum(-1)
                lowest = min(lowest, float(cosines.min(initial=1.0)))
        if not lowest >= limit:
            raise GateFailed(f"the golden vectors are reproduced to cosine {lowest:.6f}, expected {limit}", where=str(self.directory))
        return lowest

    def _run(self, pixels: Sequence[np.ndarray], output: str, width: int) -> np.ndarray:
        parts = [np.zeros((0, width), np.float32)]
        for start in range(0, len(pixels), self.batch_size):
            batch = np.stack(list(pixels[start : start + self.batch_size]))
            parts.append(self._sessions["vision"].run([output], {"pixel_values": batch})[0])
        return np.concatenate(parts)
