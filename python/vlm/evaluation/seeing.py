"""A torch model of pictures alone, as evaluation and the command line use it. n pictures, E width, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from vlm.config.errors import RequestError
from vlm.evaluation.clips import prepared, stream_of
from vlm.evaluation.evaluating import evaluating
from vlm.evaluation.material import Floats

if TYPE_CHECKING:
    from vlm.models import Model
    from vlm.runtime.embedder import Form
    from vlm.runtime.pictures import PictureLimits
    from vlm.runtime.preprocess import Preprocess


class TorchVision:
    """A model that embeds pictures and no texts, and tells classes apart where it has a head."""

    scale = 1.0
    bias = 0.0
    form: Form = "softmax"

    def __init__(self, model: Model, preprocess: Preprocess, *, name: str = "model", batch: int = 64) -> None:
        self.model, self.preprocess, self.name, self.batch = model, preprocess, name, batch
        self.classes: tuple[str, ...] = tuple(getattr(model, "classes", ()))

    def prepare_image(self, picture: Any, limits: PictureLimits | None = None) -> NDArray[np.uint8]:
        """uint8 [3, S, S], or the frames of a clip [k, 3, S, S]. Raises BadPicture."""
        return prepared(picture, self.preprocess, self.model.frames, limits)

    def encode_pixels(self, pixels: Sequence[NDArray[np.uint8]]) -> Floats:
        """[n, E] float32 unit rows of prepared pictures."""
        from vlm.runtime.embedder import normalise

        return normalise(self._run(pixels, "embedding"))

    def encode_image(self, pictures: Sequence[Any]) -> Floats:
        """[n, E] float32 unit rows of RGB pictures, encoded files or paths. Raises BadPicture."""
        return self.encode_pixels([self.prepare_image(picture) for picture in pictures])

    def encode_text(self, texts: Sequence[str]) -> NoReturn:
        """Raises RequestError: there is no text tower."""
        raise RequestError("a vision model reads no texts", remedy="tasks for it: classification, linear-probe")

    def classify(self, pictures: Sequence[Any]) -> Floats:
        """[n, K] float32 logits. Raises RequestError for a model without classes, BadPicture."""
        if not self.classes:
            raise RequestError("this model has no classes of its own", remedy="set model.classes and train them")
        return self._run([self.prepare_image(picture) for picture in pictures], "logits")

    def _run(self, pixels: Sequence[NDArray[np.uint8]], field: str) -> Floats:
        import torch

        from vlm.types import Batch

        width: int = len(self.classes) if field == "logits" else self.model.options.embed_dim  # type: ignore[attr-defined]
        parts = [np.zeros((0, width), np.float32)]
        with evaluating(self.model) as device:
            for start in range(0, len(pixels), self.batch):
                part = pixels[start : start + self.batch]
                stream, count = stream_of(part), len(part)
                zeros = torch.zeros(count, dtype=torch.int64)
                batch = Batch({"image": stream}, [str(i) for i in range(count)], zeros, zeros).to(device)
                outputs = self.model.encode(batch, {"image": frozenset({field})})["image"]
                parts.append(getattr(outputs, field).float().cpu().numpy())
        return np.concatenate(parts)
