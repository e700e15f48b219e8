"""What waits for the model: a bounded queue before one thread, and the loop that takes from it what can run together."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from vlm.serving.errors import ApiError
from vlm.serving.metrics import Metrics
from vlm.serving.settings import ServerSettings

J = TypeVar("J")


class Worker(ABC, Generic[J]):
    """Everything but the model's work happens on the event loop."""

    def __init__(self, metrics: Metrics, settings: ServerSettings, *, name: str, room: int, most: int) -> None:
        """room: how many jobs may wait; most: how many run together."""
        self._metrics, self._settings = metrics, settings
        self._name, self._room, self._most = name, room, most
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlm-model")
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name=self._name)

    async def close(self) -> None:
        """Finish what is queued and somebody still waits for, then stop."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    @property
    @abstractmethod
    def depth(self) -> int:
        """How many jobs wait."""

    def check_room(self, count: int = 1) -> None:
        """Raises ApiError 429 when the queue cannot take `count` more, 503 while the server stops."""
        if self._closing:
            raise ApiError(503, "the server is stopping", code="stopping")
        if self.depth + count > self._room:
            raise ApiError(429, "the queue is full; try again shortly", code="queue_full", headers={"Retry-After": "1"})

    def _queued(self) -> None:
        """Jobs were put in the queue."""
        self._metrics.depth.set(self.depth)
        self._wake.set()

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.depth:
                if self._settings.batch_wait_seconds and self.depth < self._most and not self._closing:
                    await asyncio.sleep(self._settings.batch_wait_seconds)
                jobs = self._take()
                self._metrics.depth.set(self.depth)
                if jobs:
                    await self._call(jobs)
            if self._closing:
                return

    @abstractmethod
    def _take(self) -> list[J]:
        """The next jobs that run together, out of the queue; what nobody waits for is dropped."""

    @abstractmethod
    async def _call(self, jobs: list[J]) -> None:
        """Run them in the thread. An error of the model is told to them, and raised no further."""

    async def _in_thread(self, work: Any, *given: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *given)


def deadline_passed() -> ApiError:
    return ApiError(504, "the request took longer than the server's deadline", code="deadline")
