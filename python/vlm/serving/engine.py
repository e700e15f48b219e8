"""The model behind the server: decoding, preparing, batching, self-test. E embedding width."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from fastapi import Request
from PIL import Image

from vlm.config.errors import DataError
from vlm.runtime.embedder import Embedder, PreparingEmbedder
from vlm.runtime.pictures import BadPicture, decode_picture
from vlm.serving.batching import Batcher, Kind
from vlm.serving.errors import ApiError
from vlm.serving.inputs import Item
from vlm.serving.lifecycle import Served, unless_gone
from vlm.serving.metrics import Metrics
from vlm.serving.settings import ServerSettings

log = logging.getLogger("vlm.serving")


class Engine(Served):
    """One embedder, shared by all requests."""

    def __init__(self, embedder: Embedder, settings: ServerSettings, metrics: Metrics) -> None:
        self._batcher = Batcher(self._encode, settings, metrics)
        super().__init__(embedder.name, settings, self._batcher)
        self.embedder, self.metrics = embedder, metrics
        self._preparing = embedder if isinstance(embedder, PreparingEmbedder) else None

    def _check(self) -> None:
        """The golden vectors of a bundle; of another model, that a picture and a text give unit vectors."""
        test = getattr(self.embedder, "self_test", None)
        if test is not None:
            test()
            return
        picture = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").save(picture, "PNG")
        rows = (self.embedder.encode_image([picture.getvalue()]), self.embedder.encode_text(["a picture"]))
        for row in rows:
            if not (np.isfinite(row).all() and np.allclose(np.linalg.norm(row, axis=1), 1, atol=1e-3)):
                raise ValueError("the model gives vectors that are not finite or not of unit length")

    async def embed(self, items: Sequence[Item], request: Request) -> np.ndarray:
        """[n, E] float32 unit vectors in the order of the items.

        Raises ApiError for a refused picture, a full queue or a passed deadline. When the client leaves, waiting
        pictures and queued items of this request are dropped.
        """
        deadline = time.monotonic() + self.settings.deadline_seconds
        if not self.ready:
            raise ApiError(503, self.failure or "the server is starting", code="not_ready", headers={"Retry-After": "1"})
        self._batcher.check_room(len(items))
        return await unless_gone(request, self._embed(items, deadline))

    async def _embed(self, items: Sequence[Item], deadline: float) -> np.ndarray:
        payloads: list[tuple[Kind, Any]] = []
        for item in items:
            payloads.append((item.kind, await self._prepare(item, deadline) if item.kind == "image" else item.value))
        try:
            return await self._batcher.run(payloads, deadline)
        except DataError as error:
            raise ApiError(400, error.message, code="bad_input") from error

    async def _prepare(self, item: Item, deadline: float) -> Any:
        """A picture's small input, or its checked bytes where the embedder decodes by itself."""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await asyncio.get_running_loop().run_in_executor(self._decoders, self._decode, item.value)
        except BadPicture as error:
            status = 413 if error.reason in ("too_many_pixels", "too_many_bytes") else 422
            raise ApiError(status, f"{item.param}: {error.message}", code=error.reason, param=item.param) from error
        except TimeoutError:
            raise ApiError(504, "the request took longer than the server's deadline", code="deadline") from None

    def _decode(self, data: str | bytes) -> Any:
        if isinstance(data, str):
            raise TypeError("a string would be read as a path")
        with self.metrics.timed("decode"):
            if self._preparing is not None:
                return self._preparing.prepare_image(data, self.settings.pictures)
            decode_picture(data, self.settings.pictures)
            return data

    def _encode(self, kind: Kind, payloads: Sequence[Any]) -> np.ndarray:
        if kind == "text":
            return self.embedder.encode_text(payloads)
        if self._preparing is not None:
            return self._preparing.encode_pixels(payloads)
        return self.embedder.encode_image(payloads)

    def count_tokens(self, items: Sequence[Item]) -> int:
        """Tokens of the texts, where the embedder can count them."""
        count: Callable[[str], int] | None = getattr(self.embedder, "count_tokens", None)
        return sum(count(item.value) for item in items if isinstance(item.value, str)) if count else 0
