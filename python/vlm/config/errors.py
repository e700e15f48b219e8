"""The errors that a user may meet, each with its exit code.

One error says what is wrong, where (file, row or key), what was expected and the remedy. The command line
prints it without a traceback and leaves with `exit_code`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ExitCode(IntEnum):
    """What the shell sees. 2 is also what click itself uses for a wrong request."""

    DONE = 0
    RUN_FAILED = 1
    WRONG_REQUEST = 2
    WRONG_DATA = 3
    OUT_OF_MEMORY = 4
    GATE_FAILED = 5
    INTERRUPTED = 130
    TERMINATED = 143


class VlmError(Exception):
    """Base of every error that vlm raises on purpose."""

    exit_code: ExitCode = ExitCode.RUN_FAILED

    def __init__(self, message: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.message = message
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.message}" if self.where else self.message
        return f"{head}\n  {self.remedy}" if self.remedy else head


class RunFailed(VlmError):
    """The run itself failed: a loss that is not finite, a full disk, a lost rank."""

    exit_code = ExitCode.RUN_FAILED


class RequestError(VlmError):
    """The request was wrong: an unknown preset, option, task or an impossible combination."""

    exit_code = ExitCode.WRONG_REQUEST


class PresetError(RequestError):
    """A preset was wrong. `where` is `file:line:column`, or `command line: key` for an override.

    problems: everything that validation found, each with `where`, `message` and `remedy`; empty for other errors.
    """

    problems: tuple[Any, ...] = ()


class DataError(VlmError):
    """The data was wrong or missing. `where` names the file and the row or key."""

    exit_code = ExitCode.WRONG_DATA


class CheckpointError(DataError):
    """A checkpoint, model directory or bundle is missing, incomplete, altered or of a refused format."""


class OutOfMemory(VlmError):
    """Memory ran out; the remedy names a setting that fits."""

    exit_code = ExitCode.OUT_OF_MEMORY


class GateFailed(VlmError):
    """A parity or evaluation gate failed: nothing was published."""

    exit_code = ExitCode.GATE_FAILED
