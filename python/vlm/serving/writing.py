"""Answers to many requests from one model: what waits together starts together, in one worker thread.

n rows of a batch, V vocabulary.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm.config.errors import VlmError
from vlm.runtime.generation import Decoding, Event, Generator, Prompt, Stepper, stream
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

    def tell(self, item: Any) -> None:
        """From the worker: an event, an error, or the end."""
        self.loop.call_soon_threadsafe(self.events.put_nowait, item)

    async def read(self) -> AsyncIterator[Event]:
        """Events until the last. Raises ApiError 504 when the deadline passes and what the model raised.

        Left early, the answer is cancelled: its row ends with the next token.
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
    """Prompts with equal settings are answered together, from the first token to the last."""

    def __init__(self, generator: Generator, settings: ServerSettings, metrics: Metrics) -> None:
        super().__init__(metrics, settings, name="vlm-writer", room=settings.queue_answers, most=settings.max_answers)
        self._generator = generator
        self._queue: deque[Job] = deque()

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
        """The oldest job and those behind it with equal settings, in their order; what nobody waits for is dropped."""
        jobs: list[Job] = []
        kept: list[Job] = []
        while self._queue:
            job = self._queue.popleft()
            if job.cancelled.is_set():
                self._metrics.rejected.labels("dropped").inc()
            elif len(jobs) < self._most and (not jobs or job.decoding == jobs[0].decoding):
                jobs.append(job)
            else:
                kept.append(job)
        self._queue.extend(kept)
        return jobs

    async def _call(self, jobs: list[Job]) -> None:
        await self._in_thread(self._write, jobs)

    def _write(self, jobs: Sequence[Job]) -> None:
        """In the worker thread: one batch from its prompts to its last token."""
        begun = time.perf_counter()
        for job in jobs:
            self._metrics.stage.labels("queue").observe(begun - job.queued)
        self._metrics.batch.labels("answer").observe(len(jobs))
        told = [False] * len(jobs)
        try:
            generator: Any = _Cancellable(self._generator, [job.cancelled for job in jobs])
            with self._metrics.timed("model"):
                for event in stream(generator, [job.prompt for job in jobs], jobs[0].decoding, keys=[job.key for job in jobs]):
                    job = jobs[event.row]
                    if not told[event.row]:
                        told[event.row] = True
                        self._metrics.first_token.observe(time.perf_counter() - job.queued)
                    self._metrics.tokens.inc()
                    job.tell(event)
                    if event.finish_reason is not None:
                        job.tell(_END)
                    if all(job.cancelled.is_set() for job in jobs):
                        return  # leaving the loop ends the generation
        except Exception as error:
            if not isinstance(error, VlmError):
                log.exception("the model failed on a batch of %d prompts", len(jobs))
            for job in jobs:
                job.tell(error)


class _Cancellable:
    """A generator whose rows can be ended from outside: a row nobody reads gets no other token than one that ends it."""

    def __init__(self, generator: Generator, cancelled: Sequence[threading.Event]) -> None:
        self._generator, self._cancelled = generator, cancelled

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generator, name)

    def stepper(self) -> Stepper:
        ends = np.array(sorted(self._generator.eos_ids), np.int64)
        return _CancellableStepper(self._generator.stepper(), self._cancelled, ends)


class _CancellableStepper:
    def __init__(self, inner: Stepper, cancelled: Sequence[threading.Event], ends: np.ndarray) -> None:
        self.vocab_size = inner.vocab_size
        self._inner, self._rows, self._ends = inner, list(cancelled), ends

    def start(self, prompts: Sequence[Prompt]) -> np.ndarray:
        return self._ended(self._inner.start(prompts))

    def advance(self, ids: np.ndarray) -> np.ndarray:
        return self._ended(self._inner.advance(ids))

    def reorder(self, index: np.ndarray) -> None:
        self._inner.reorder(index)
        self._rows = [self._rows[int(i)] for i in index]

    def _ended(self, logits: np.ndarray) -> np.ndarray:
        gone = [row for row, event in enumerate(self._rows) if event.is_set()]
        if not gone or not len(self._ends):
            return logits
        logits = logits.copy()
        logits[gone] = -np.inf
        logits[np.ix_(np.array(gone), self._ends)] = 0.0
        return logits
