"""Progress of a stage: a bar on a terminal, plain lines elsewhere; always on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

LINES = 20
"""Plain lines over a stage when there is no terminal."""


class Progress:
    """bar: draw a bar; otherwise about `LINES` lines are noted over the stage, and at least one a minute."""

    def __init__(self, total: int, done: int, bar: bool, note: Callable[[str], None]) -> None:
        self.total = total
        self.done = done
        self.started_at = done
        self.bar = bar
        self.note = note
        self.started = self.last = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> Progress:
        if self.bar:
            from tqdm import tqdm

            self._bar = tqdm(total=self.total, initial=self.done, unit="step", dynamic_ncols=True)
        return self

    def update(self, step: int, values: dict[str, float]) -> None:
        self.done = step
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {values['train/loss']:.4f}", refresh=False)
            self._bar.update(1)
            return
        now = time.monotonic()
        if step % max(1, self.total // LINES) == 0 or step == self.total or now - self.last > 60:
            self.last = now
            left = (now - self.started) / max(1, step - self.started_at) * (self.total - step)
            self.note(
                f"step {step}/{self.total}  loss {values['train/loss']:.4f}  "
                f"{values['perf/samples_per_s']:.0f} samples/s  {left:.0f} s left"
            )

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
