"""One process trains a run at a time: a lock on its directory that leaves no file and ends with the process, however that ends."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlm.config.errors import RequestError

PATIENCE = 2.0
"""Seconds to wait for the lock: one that looks (`is_locked`), or a process that is just being ended, holds it for moments."""


@contextmanager
def locked_run(folder: Path) -> Iterator[None]:
    """Raises RequestError while another process trains the run. A file system without locks has none, and says nothing."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + PATIENCE
        while not _taken(handle, fcntl.LOCK_EX):
            if time.monotonic() > until:
                remedy = "wait for it, or choose another --output"
                raise RequestError("another process is training this run", where=str(folder), remedy=remedy)
            time.sleep(0.05)
        yield
    finally:
        os.close(handle)


def is_locked(folder: Path) -> bool:
    """Whether a process trains the run now."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return not _taken(handle, fcntl.LOCK_SH)
        finally:
            os.close(handle)
    return False


def _taken(handle: int, kind: int) -> bool:
    """False when another has the lock; True when it is ours, or there are no locks here."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True
