"""Small batches from many requests: a bounded queue before one worker that calls the model.

E embedding width.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlm.serving.errors import ApiError
from vlm.serving.metrics import Metrics
from vlm.serving.settings import ServerSettings

Kind = Literal["text", "image"]


@dataclass
class _Job:
    kind: Kind
    payload: Any
    deadline: float
    result: asyncio.Future[np.ndarray]
    queued: float = field(default_factory=time.perf_counter)

    @property
    def wanted(self) -> bool:
        """False once its client has left or its time is over."""
        return not self.result.done()


class Batcher:
    """Items of like kind run together, oldest first. Everything but the model call happens on the event loop."""

    def __init__(self, encode: Callable[[Kind, Sequence[Any]], np.ndarray], settings: ServerSettings, metrics: Metrics) -> None:
        self._encode, self._settings, self._metrics = encode, settings, metrics
        self._queues: dict[Kind, deque[_Job]] = {"text": deque(), "image": deque()}
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlm-model")
        self._task: asyncio.Task[None] | None = None
        self._closing = False

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), name="vlm-batcher")

    async def close(self) -> None:
        """Finish what is queued, then stop."""
        self._closing = True
        self._wake.set()
        if self._task is not None:
            await self._task
        self._thread.shutdown()

    @property
    def depth(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def check_room(self, count: int) -> None:
        """Raises ApiError 429 when the queue cannot take `count` more, 503 while the server stops."""
        if self._closing:
            raise ApiError(503, "the server is stopping", code="stopping")
        if self.depth + count > self._settings.queue_items:
            raise ApiError(429, "the queue is full; try again shortly", code="queue_full", headers={"Retry-After": "1"})

    async def run(self, items: Sequence[tuple[Kind, Any]], deadline: float) -> np.ndarray:
        """[n, E] of the items, in their order. Raises ApiError 429 (full), 503 (stopping) or 504 (deadline).

        Cancelling the caller takes its items out of the queue.
        """
        self.check_room(len(items))
        loop = asyncio.get_running_loop()
        jobs = [_Job(kind, payload, deadline, loop.create_future()) for kind, payload in items]
        for job in jobs:
            self._queues[job.kind].append(job)
        self._metrics.depth.set(self.depth)
        self._wake.set()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return np.stack(await asyncio.gather(*(job.result for job in jobs)))
        except TimeoutError:
            raise ApiError(504, "the request took longer than the server's deadline", code="deadline") from None
        finally:
            for job in jobs:
                job.result.cancel()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.depth:
                if self._settings.batch_wait_seconds and self.depth < self._settings.max_batch and not self._closing:
                    await asyncio.sleep(self._settings.batch_wait_seconds)
                jobs = self._take()
                if jobs:
                    await self._call(loop, jobs)
            if self._closing:
                return

    def _take(self) -> list[_Job]:
        """The next batch: of the kind whose oldest item has waited longest; what nobody waits for is dropped."""
        for queue in self._queues.values():
            while queue and not queue[0].wanted:
                queue.popleft()
                self._metrics.rejected.labels("dropped").inc()
        waiting = [queue for queue in self._queues.values() if queue]
        jobs: list[_Job] = []
        if waiting:
            queue = min(waiting, key=lambda q: q[0].queued)
            while queue and len(jobs) < self._settings.max_batch:
                job = queue.popleft()
                if job.wanted:
                    jobs.append(job)
                else:
                    self._metrics.rejected.labels("dropped").inc()
        self._metrics.depth.set(self.depth)
        return jobs

    async def _call(self, loop: asyncio.AbstractEventLoop, jobs: list[_Job]) -> None:
        now = time.perf_counter()
        for job in jobs:
            self._metrics.stage.labels("queue").observe(now - job.queued)
        self._metrics.batch.labels(jobs[0].kind).observe(len(jobs))
        try:
            with self._metrics.timed("model"):
                rows = await loop.run_in_executor(self._thread, self._encode, jobs[0].kind, [job.payload for job in jobs])
        except Exception as error:
            for job in jobs:
                if job.wanted:
                    job.result.set_exception(error)
            return
        for job, row in zip(jobs, rows):
            if job.wanted:
                job.result.set_result(row)
