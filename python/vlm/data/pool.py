"""Decode samples here or in worker processes, ahead of time, and hand them out in any order asked for."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from vlm.config.errors import RunFailed
from vlm.data.decode import Decoded, Job, decoder_of, unpack
from vlm.data.worker import FRAME, read_frame

CHUNK = 8
"""Samples that travel together."""
_PATIENCE = 600.0
"""Seconds without any result after which a worker counts as stuck."""


class InlineDecoder:
    """Decodes when asked, in this process."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._decoder = decoder_of(spec)
        self._jobs: dict[int, Job] = {}

    def submit(self, jobs: Sequence[tuple[int, Job]]) -> None:
        self._jobs.update(jobs)

    def take(self, position: int) -> Decoded:
        return self._decoder.decode(self._jobs.pop(position))

    def forget(self) -> None:
        self._jobs.clear()

    def close(self) -> None:
        self._jobs.clear()


class _Worker:
    """One process, with a thread that empties its output so that it never waits for us."""

    def __init__(self, number: int, spec: bytes) -> None:
        self.number = number
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "vlm.data.worker",
            ],  # -P: nothing is imported from the current folder
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,  # an interrupt from the terminal is for the trainer alone
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.pending: deque[list[int]] = deque()
        self.results: queue.SimpleQueue[list[Decoded] | None] = queue.SimpleQueue()
        self.outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=loop, name=f"vlm-data-{number}-{name}", daemon=True)
            for name, loop in (("in", self._receive), ("out", self._send))
        ]
        for thread in self._threads:
            thread.start()
        self.send(spec)

    def send(self, body: bytes) -> None:
        self.outbox.put(FRAME.pack(len(body), 0) + body)

    def _send(self) -> None:
        while (message := self.outbox.get()) is not None:
            try:
                self.stdin.write(message)
                self.stdin.flush()
            except (OSError, ValueError):
                return  # the worker died; the receiving thread says so

    def _receive(self) -> None:
        try:
            while (frame := read_frame(self.stdout)) is not None:
                self.results.put(unpack(*frame))
        except (OSError, ValueError):
            pass
        self.results.put(None)

    def next_chunk(self) -> list[Decoded]:
        """The results of the oldest chunk. Raises RunFailed when the worker is gone or stuck."""
        try:
            results = self.results.get(timeout=_PATIENCE)
        except queue.Empty:
            raise RunFailed(f"data worker {self.number} has sent nothing for {_PATIENCE:.0f} s") from None
        if results is None:
            self.results.put(None)
            code = self.process.wait(timeout=10)
            cause = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise RunFailed(
                f"data worker {self.number} ended ({cause})",
                remedy="if it ran out of memory, lower data.workers, data.prefetch or data.max_pixels; the run can be resumed",
            )
        return results

    def close(self) -> None:
        self.outbox.put(None)
        self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(timeout=10)
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                stream.close()


class WorkerPool:
    """`workers` processes; chunks go round them in turn, so results come back in a known order."""

    def __init__(self, spec: dict[str, Any], workers: int) -> None:
        self._workers: list[_Worker] = []
        message = json.dumps(spec).encode()
        try:
            for number in range(workers):
                self._workers.append(_Worker(number, message))
        except BaseException:
            self.close()
            raise
        self._turn = 0
        self._owner: dict[int, int] = {}
        self._ready: dict[int, Decoded] = {}

    def submit(self, jobs: Sequence[tuple[int, Job]]) -> None:
        """Start decoding samples; each is known by its position, which is used once."""
        for start in range(0, len(jobs), CHUNK):
            part = jobs[start : start + CHUNK]
            worker = self._workers[self._turn]
            positions = [position for position, _ in part]
            worker.pending.append(positions)
            worker.send(json.dumps([[j.recipe, j.image_key, j.caption_key, j.stream_keys] for _, j in part]).encode())
            for position in positions:
                self._owner[position] = self._turn
            self._turn = (self._turn + 1) % len(self._workers)

    def take(self, position: int) -> Decoded:
        """The result at a position that was submitted; waits for it. Raises RunFailed when its worker is gone."""
        while position not in self._ready:
            worker = self._workers[self._owner[position]]
            positions = worker.pending[0]
            results = worker.next_chunk()
            worker.pending.popleft()
            for done, result in zip(positions, results, strict=True):
                if self._owner.pop(done, None) is not None:
                    self._ready[done] = result
        return self._ready.pop(position)

    def forget(self) -> None:
        """Drop everything submitted and not taken; what is still being decoded is thrown away when it arrives."""
        self._ready.clear()
        self._owner.clear()
        for worker in self._workers:
            for chunk in worker.pending:
                chunk[:] = [-1] * len(chunk)

    def close(self) -> None:
        """End the processes and threads."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __del__(self) -> None:
        self.close()


def open_decoder(spec: dict[str, Any], workers: int) -> InlineDecoder | WorkerPool:
    return WorkerPool(spec, workers) if workers else InlineDecoder(spec)
