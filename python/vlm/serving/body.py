"""Bounded request bodies: counted while they arrive, within a time limit, for a bounded number of requests."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlm.serving.errors import ApiError
from vlm.serving.metrics import Metrics
from vlm.serving.settings import ServerSettings

# What was not read of a refused body must not be taken for the next request.
_CLOSE = {"Connection": "close"}


class BodyLimits:
    """Reads the whole body before the application starts, so that no route can forget a limit."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self._running = 0
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self.app(scope, receive, send)
            return
        try:
            if self._running >= self.settings.max_requests:
                raise ApiError(429, "too many requests at a time", code="too_many_requests", headers={"Retry-After": "1", **_CLOSE})
            self._running += 1
            body = bytearray()
            try:
                await self._read(scope, receive, body)
                await self.app(scope, _replay(bytes(body), receive), send)
            finally:
                self._running -= 1
                self._held -= len(body)
        except _Gone:
            self.metrics.rejected.labels("disconnected").inc()
        except ApiError as error:
            self.metrics.rejected.labels(error.code).inc()
            await error.response()(scope, receive, send)

    async def _read(self, scope: MutableMapping[str, Any], receive: Receive, body: bytearray) -> None:
        """Fill `body`; what it holds is counted in `_held` at every moment."""
        limit = self.settings.max_body_bytes
        too_large = ApiError(413, f"the body is larger than {limit} bytes", code="body_too_large", headers=_CLOSE)
        stated = Headers(scope=scope).get("content-length")
        if stated is not None and stated.isdigit() and (len(stated) > 15 or int(stated) > limit):
            raise too_large
        if Headers(scope=scope).get("content-encoding", "identity") != "identity":
            raise ApiError(415, "compressed bodies are not accepted", code="content_encoding", headers=_CLOSE)
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    part = message.get("body", b"")
                    body += part
                    self._held += len(part)
                    if len(body) > limit:
                        raise too_large
                    if self._held > self.settings.max_held_bytes:
                        raise ApiError(429, "too much is being received", code="too_many_bytes", headers={"Retry-After": "1", **_CLOSE})
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.settings.body_seconds:g} s", code="body_timeout", headers=_CLOSE
            ) from None


class _Gone(Exception):
    """The client left while it was sending."""


def _replay(body: bytes, receive: Receive) -> Receive:
    """First the whole body, then whatever the server says (that the client left)."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
