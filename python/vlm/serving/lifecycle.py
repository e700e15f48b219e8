"""What every served model has: a worker that starts and ends, a self-test before it is ready, clients that may leave."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request

from vlm.serving.errors import ApiError
from vlm.serving.settings import ServerSettings
from vlm.serving.worker import Worker

log = logging.getLogger("vlm.serving")
Result = TypeVar("Result")


class Served:
    """A model behind the server. ready: its self-test has passed; failure: why it has not."""

    def __init__(self, name: str, settings: ServerSettings, worker: Worker[Any]) -> None:
        self.name, self.settings = settings.name or name, settings
        self.ready = False
        self.failure: str | None = None
        self.created = int(time.time())
        self._decoders = ThreadPoolExecutor(settings.decode_threads, thread_name_prefix="vlm-decode")
        self._worker = worker
        self._test: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to serve; ready once the self-test has passed."""
        self._worker.start()
        self._test = asyncio.get_running_loop().create_task(self._self_test(), name="vlm-self-test")

    async def close(self) -> None:
        """Finish queued work that somebody waits for, and stop."""
        if self._test is not None:
            await asyncio.gather(self._test, return_exceptions=True)
        await self._worker.close()
        self._decoders.shutdown(wait=True, cancel_futures=True)

    async def _self_test(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._decoders, self._check)
        except Exception as error:
            self.failure = str(error)
            log.error("self-test failed: %s", error)
            return
        self.ready = True

    def _check(self) -> None:
        """Raises when the model does not do what it must."""
        raise TypeError(f"{type(self).__name__} defines no _check")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The work's result; it is cancelled as soon as the client disconnects."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnect(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client left", code="disconnected")
        return task.result()
    finally:
        for pending in (task, watch):
            pending.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def disconnect(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
