"""metrics.jsonl: one line an update or evaluation, the base log that everything else is derived from.

A line is a JSON object with `step` and named numbers. `time` and every `perf/...` name depend on the machine; all
other fields of a resumed run equal those of an uninterrupted one, because the file is cut to the checkpoint's offset.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from vlm.config.errors import RunFailed


class MetricsLog:
    """Appends lines; `offset` goes into checkpoints and `rewind` cuts back to it. A null log for ranks above 0."""

    def __init__(self, path: Path | None, *, tensorboard: Path | None = None) -> None:
        self.path = path
        self.started = time.monotonic()
        self._file = None if path is None else path.open("ab")
        self._board: Any = None
        if tensorboard is not None and path is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(tensorboard))

    @property
    def offset(self) -> int:
        """Bytes written so far."""
        if self._file is None:
            return 0
        self._file.flush()
        return self._file.tell()

    def rewind(self, offset: int) -> None:
        """Forget what was written after a checkpoint."""
        if self._file is not None:
            self._file.flush()
            self._file.truncate(offset)
            self._file.seek(0, os.SEEK_END)

    def write(self, step: int, values: dict[str, float]) -> None:
        """One line. Raises RunFailed naming the file when the disk refuses."""
        if self._file is None:
            return
        line = {"step": step, "time": round(time.monotonic() - self.started, 3), **values}
        try:
            self._file.write((json.dumps(line) + "\n").encode())
            self._file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):  # it would try the same line once more
                self._file.close()
            self._file = None
            remedy = "make room; --resume continues from the last checkpoint"
            raise RunFailed(f"cannot be written: {error.strerror}", where=str(self.path), remedy=remedy) from error
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()
