"""Answers to many requests from one model, side by side in one worker thread: each begins with the next token of those that
are being written, and leaves when it ends."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from vlm.config.errors import VlmError
from vlm.runtime.generation import Decoding, Event, Failed, Generator, Prompt, Request, Rolling
from vlm.serving.metrics import Metrics
from vlm.serving.settings import ServerSettings
from vlm.serving.worker import Worker, deadline_passed

log = logging.getLogger("vlm.serving")

_END = object()


@dataclass(eq=False)
class Job:
    """One answer: what is asked, and the events as they come."""

    prompt: Prompt
    decoding: Decoding
    key: str
    deadline: float
    loop: asyncio.AbstractEventLoop
    queued: float = field(default_factory=time.perf_counter)
    events: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    begun: float | None = None  # when its prompt was read
    told: bool = False  # whether a token was written

    def tell(self, item: Any) -> None:
        """From the worker: an event, an error, or the end."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, item)

    async def read(self) -> AsyncIterator[Event]:
        """Events until the last. Raises ApiError 504 when the deadline passes and what the model raised.

        Left early, the answer is cancelled: its row is dropped before the next token.
        """
        try:
            while True:
                async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                    item = await self.events.get()
                if item is _END:
                    return
                if isinstance(item, BaseException):
                    raise item
                yield item
        except TimeoutError:
            raise deadline_passed() from None
        finally:
            self.cancelled.set()


class Writer(Worker[Job]):
    """A prompt that comes joins those that are being written, whatever their settings, once there is a place."""

    def __init__(self, generator: Generator, settings: ServerSettings, metrics: Metrics) -> None:
        super().__init__(metrics, settings, name="vlm-writer", room=settings.queue_answers, most=settings.max_answers)
        self._generator = generator
        self._queue: deque[Job] = deque()
        self._taking = threading.Lock()

    @property
    def depth(self) -> int:
        return len(self._queue)

    def put(self, prompt: Prompt, decoding: Decoding, key: str, deadline: float) -> Job:
        """A job in the queue. key: what its draws hang on, beside nothing else. Raises ApiError 429 or 503."""
        self.check_room()
        job = Job(prompt, decoding, key, deadline, asyncio.get_running_loop())
        self._queue.append(job)
        self._queued()
        return job

    def _take(self) -> list[Job]:
        return self._arrived(self._most)

    def _arrived(self, places: int) -> list[Job]:
        """The oldest jobs, at most `places`, out of the queue; from any thread."""
        jobs: list[Job] = []
        with self._taking:
            while self._queue and len(jobs) < places:
                job = self._queue.popleft()
                if job.cancelled.is_set():
                    self._metrics.rejected.labels("dropped").inc()
                else:
                    jobs.append(job)
        self._metrics.depth.set(self.depth)
        return jobs

    async def _call(self, jobs: list[Job]) -> None:
        await self._in_thread(self._write, jobs)

    def _write(self, jobs: list[Job]) -> None:
        """In the worker thread: until nothing is being written and nothing waits."""
        rolling, rows = Rolling(self._generator), dict[int, Job]()
        while jobs or rows:
            if jobs:
                rows |= self._begin(rolling, jobs)
                self._metrics.batch.labels("answer").observe(len(rows))
            try:
                left = {row for row, job in rows.items() if job.cancelled.is_set()}
                rolling.drop(left)
                for row in left:
                    self._ended(rows.pop(row))
                for told in rolling.step():
                    self._tell(rows, told)
            except Exception as error:
                self._lost(rows.values(), error)
                rolling, rows = Rolling(self._generator), {}
            jobs = self._arrived(self._most - len(rows))

    def _begin(self, rolling: Rolling, jobs: list[Job]) -> dict[int, Job]:
        now = time.perf_counter()
        for job in jobs:
            job.begun = now
            self._metrics.stage.labels("queue").observe(now - job.queued)
        try:
            return dict(zip(rolling.add([Request(job.prompt, job.decoding, job.key) for job in jobs]), jobs, strict=True))
        except Exception as error:  # before these had rows: the others go on
            self._lost(jobs, error)
            return {}

    def _tell(self, rows: dict[int, Job], told: Event | Failed) -> None:
        job = rows[told.row]
        if isinstance(told, Failed):
            job.tell(told.error)
            self._ended(rows.pop(told.row))
            return
        if not job.told:
            job.told = True
            self._metrics.first_token.observe(time.perf_counter() - job.queued)
        self._metrics.tokens.inc()
        job.tell(told)
        if told.finish_reason is not None:
            job.tell(_END)
            self._ended(rows.pop(told.row))

    def _ended(self, job: Job) -> None:
        if job.begun is not None:
            self._metrics.stage.labels("model").observe(time.perf_counter() - job.begun)

    def _lost(self, jobs: Iterable[Job], error: Exception) -> None:
        """What failed is told to all whose rows it took away."""
        jobs = list(jobs)
        if not isinstance(error, VlmError):
            log.error("the model failed on %d prompts", len(jobs), exc_info=error)
        for job in jobs:
            job.tell(error)
