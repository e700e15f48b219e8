"""`-n N`: the same command in N processes on this machine, watched as one.

Signals go to all ranks; when one rank dies the others are stopped; the exit code is that of the first failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

GRACE = 30.0
"""Seconds that ranks have to leave by themselves after one of them has died or a signal has come."""


def launch(arguments: Sequence[str], processes: int, threads: int) -> int:
    """Run `vlm ARGUMENTS` in `processes` processes and return the exit code."""
    with tempfile.TemporaryDirectory(prefix="vlm-ranks-") as folder:
        ranks = []
        for rank in range(processes):
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "VLM_RENDEZVOUS": (Path(folder) / "rendezvous").as_uri(),
                "OMP_NUM_THREADS": str(threads),
            }
            ranks.append(subprocess.Popen([sys.executable, "-m", "vlm", *arguments], env=environment))
        return _watch(ranks)


def _watch(ranks: list[subprocess.Popen[bytes]]) -> int:
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    deadline: float | None = None
    first_failure: tuple[int, int] | None = None
    try:
        while any(process.poll() is None for process in ranks):
            for rank, process in enumerate(ranks):
                code = process.poll()
                if code not in (None, 0) and first_failure is None:
                    first_failure = (rank, code)
                    deadline = time.monotonic() + GRACE
                    if code not in (130, 143):
                        print(f"rank {rank} of {len(ranks)} ended with code {code}; stopping the others", file=sys.stderr)
                        deadline = time.monotonic() + 5
            if deadline is not None and time.monotonic() > deadline:
                for process in ranks:
                    if process.poll() is None:
                        process.kill()
            time.sleep(0.05)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for rank, process in enumerate(ranks):
        if first_failure is None and process.returncode:
            first_failure = (rank, process.returncode)
    if first_failure is None:
        return 0
    code = first_failure[1]
    return 128 - code if code < 0 else code
