"""Small batches from many requests for embeddings.

E embedding width.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from vlm.serving.metrics import Metrics
from vlm.serving.settings import ServerSettings
from vlm.serving.worker import Worker, deadline_passed

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


class Batcher(Worker[_Job]):
    """Items of like kind run together, oldest first."""

    def __init__(self, encode: Callable[[Kind, Sequence[Any]], np.ndarray], settings: ServerSettings, metrics: Metrics) -> None:
        super().__init__(metrics, settings, name="vlm-batcher", room=settings.queue_items, most=settings.max_batch)
        self._encode = encode
        self._queues: dict[Kind, deque[_Job]] = {"text": deque(), "image": deque()}

    @property
    def depth(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    async def run(self, items: Sequence[tuple[Kind, Any]], deadline: float) -> np.ndarray:
        """[n, E] of the items, in their order. Raises ApiError 429 (full), 503 (stopping) or 504 (deadline).

        Cancelling the caller takes its items out of the queue.
        """
        self.check_room(len(items))
        loop = asyncio.get_running_loop()
        jobs = [_Job(kind, payload, deadline, loop.create_future()) for kind, payload in items]
        for job in jobs:
            self._queues[job.kind].append(job)
        self._queued()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return np.stack(await asyncio.gather(*(job.result for job in jobs)))
        except TimeoutError:
            raise deadline_passed() from None
        finally:
            for job in jobs:
                job.result.cancel()

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
            while queue and len(jobs) < self._most:
                job = queue.popleft()
                if job.wanted:
                    jobs.append(job)
                else:
                    self._metrics.rejected.labels("dropped").inc()
        return jobs

    async def _call(self, jobs: list[_Job]) -> None:
        now = time.perf_counter()
        for job in jobs:
            self._metrics.stage.labels("queue").observe(now - job.queued)
        self._metrics.batch.labels(jobs[0].kind).observe(len(jobs))
        try:
            with self._metrics.timed("model"):
                rows = await self._in_thread(self._encode, jobs[0].kind, [job.payload for job in jobs])
        except Exception as error:
            for job in jobs:
                if job.wanted:
                    job.result.set_exception(error)
            return
        for job, row in zip(jobs, rows):
            if job.wanted:
                job.result.set_result(row)
