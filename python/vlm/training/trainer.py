"""The training loop of one stage: data, update, schedule, evaluation, checkpoints, signals. It knows no model family."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from vlm.config.errors import ExitCode, OutOfMemory, RunFailed
from vlm.data.endless import Loader
from vlm.models import Model
from vlm.schedules import interval_in_steps, rate_factor
from vlm.training.average import WeightAverage
from vlm.training.carry import Carried
from vlm.training.checkpoint import Checkpoints
from vlm.training.companions import Companions
from vlm.training.engine import Clock, Engine, UpdateResult
from vlm.training.metrics import MetricsLog
from vlm.training.optimizer import NamedOptimizer
from vlm.training.preset import Stage
from vlm.training.progress import Progress
from vlm.types import Communicator
from vlm.types.state import Tree

SKIP_LIMIT = 20
"""Updates in a row whose loss is not finite before even `skip` stops."""


class Interrupted(Exception):
    """A signal came; the checkpoint is written. `code` is the exit code."""

    def __init__(self, code: ExitCode) -> None:
        super().__init__(code.name.lower())
        self.code = code


class Stopped(BaseException):
    """A signal came inside `Signals.ending`. No error, so that nothing takes it for one and goes on."""


SAME_PRESS = 1.0
"""Seconds within which two SIGINT are one: a terminal sends it to every rank, and the process that started them passes it on."""


class Signals:
    """Remembers SIGINT and SIGTERM until the loop asks; a second SIGINT ends at once."""

    def __init__(self) -> None:
        self.number = 0
        self.came = 0.0
        self.ends = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number == signal.SIGINT == number:
            if now - self.came >= SAME_PRESS:
                raise KeyboardInterrupt
            return
        self.number, self.came = number, now
        if self.ends:
            raise Stopped

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """A signal ends the block at once by Stopped: for work that may be done again and leaves no state behind."""
        self.ends = True
        try:
            if self.number:
                raise Stopped
            yield
        finally:
            self.ends = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[Signals]:
        try:
            old = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: the caller owns the signals
            yield self
            return
        try:
            yield self
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@dataclass
class Cursor:
    """Where a run stands: loop round, stage and updates done in that stage; `due` when the evaluation after the last of them
    is still to come; `done` once the last stage ended."""

    round: int = 0
    stage: int = 0
    step: int = 0
    total: int = 0
    due: bool = False
    done: bool = False

    def state_dict(self) -> Tree:
        return dict(self.__dict__)

    def load_state_dict(self, state: Tree) -> None:
        self.__dict__.update(state)


@dataclass
class Parts:
    """Everything a stage trains with; what is mutable in it goes into the checkpoint."""

    stage: Stage
    model: Model
    engine: Engine
    optimizer: NamedOptimizer
    companions: Companions
    loader: Loader
    objectives: nn.ModuleDict
    average: WeightAverage | None
    steps: int
    samples: int | None
    carried: Carried = field(default_factory=Carried)
    extra: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """Runs the updates of a stage from wherever the cursor stands to its end."""

    def __init__(
        self,
        parts: Parts,
        cursor: Cursor,
        checkpoints: Checkpoints,
        metrics: MetricsLog,
        communicator: Communicator,
        *,
        evaluate: Callable[[Parts], dict[str, float]] | None = None,
        note: Callable[[str], None] = print,
        progress: bool = False,
    ) -> None:
        self.parts = parts
        self.cursor = cursor
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.communicator = communicator
        self.evaluate = evaluate
        self.note = note
        self.show = progress
        self.skipped = 0

    def state_dict(self) -> Tree:
        """The whole mutable state of the run."""
        parts = self.parts
        tree: Tree = {
            "model": parts.model.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "objectives": parts.objectives.state_dict(),
            "companions": parts.companions.state_dict(),
            "average": parts.average.state_dict() if parts.average else None,
            "loader": parts.loader.state_dict(),
            "carried": parts.carried.state_dict(),
            "cursor": self.cursor.state_dict(),
            "metrics": {"offset": self.metrics.offset},
        }
        return tree

    def load_state_dict(self, tree: Tree) -> None:
        parts = self.parts
        parts.model.load_state_dict(tree["model"])
        parts.optimizer.load_state_dict(tree["optimizer"])
        parts.objectives.load_state_dict(tree["objectives"])
        parts.companions.load_state_dict(tree["companions"])
        if parts.average is not None:
            parts.average.load_state_dict(tree["average"])
        parts.loader.load_state_dict(tree["loader"])
        self.cursor.load_state_dict(tree["cursor"])
        self.metrics.rewind(int(tree["metrics"]["offset"]))

    def save(self) -> None:
        """One checkpoint, named by the updates of the whole run; rank 0 writes, all wait."""
        self.parts.companions.flush()
        if self.communicator.rank == 0:
            self.checkpoints.save(self.cursor.total, self.state_dict())
        self.communicator.barrier()

    def run(self) -> None:
        """All updates that are left. Raises Interrupted after a signal, with the checkpoint written."""
        parts, cursor = self.parts, self.cursor
        train = parts.stage.train
        every = interval_in_steps(train.checkpoint_every, total=parts.steps, batch_size=train.batch_size, samples=parts.samples)
        look = interval_in_steps(parts.stage.evaluation.every, total=parts.steps, batch_size=train.batch_size, samples=parts.samples)
        with Signals().watched() as signals, Progress(parts.steps, cursor.step, self.show, self.note) as progress:
            while cursor.step < parts.steps:
                if not cursor.due:  # else a signal came in the evaluation, which is made up for
                    started = time.perf_counter()
                    values = self.step()
                    cursor.step += 1
                    cursor.total += 1
                    values["perf/step_s"] = time.perf_counter() - started
                    values["perf/samples_per_s"] = train.batch_size / values["perf/step_s"]
                    values["perf/data_wait_share"] = values.pop("wait") / values["perf/step_s"]
                    if cursor.step % train.log_every == 0 or cursor.step == parts.steps:
                        self.metrics.write(cursor.total, values)
                    progress.update(cursor.step, values)
                last = cursor.step == parts.steps
                cursor.due = self.evaluate is not None and look > 0 and cursor.step % look == 0 and not last
                if cursor.due:
                    cursor.due = not self._evaluated(signals)
                number = max(n for (n,) in self.communicator.gather_numbers([signals.number]))
                if number:
                    self.save()
                    raise Interrupted(ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED)
                if every and cursor.step % every == 0 and not last:
                    self.save()

    def _evaluated(self, signals: Signals) -> bool:
        """Evaluate the weights, averaged if there is an average, on rank 0, while the others wait. False where a signal ended it."""
        parts, done = self.parts, True
        assert self.evaluate is not None
        if self.communicator.rank == 0:
            with contextlib.nullcontext() if parts.average is None else parts.average.applied(parts.model):
                try:
                    with signals.ending():
                        values = self.evaluate(parts)
                except Stopped:
                    done = False
            if done:
                self.metrics.write(self.cursor.total, values)
        self.communicator.barrier()
        return all(n for (n,) in self.communicator.gather_numbers([int(done)]))

    def step(self) -> dict[str, float]:
        """One update; the numbers of its metrics line."""
        parts, cursor = self.parts, self.cursor
        train = parts.stage.train
        waited = time.perf_counter()
        batch = next(parts.loader)
        waited = time.perf_counter() - waited
        parts.model.train()
        parts.optimizer.zero_grad()
        try:
            result = parts.engine.update(batch.split(train.accumulate), Clock(cursor.step, parts.steps, cursor.stage, cursor.round))
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise self._out_of_memory(train.accumulate) from error
        except RuntimeError as error:
            if "allocate" in str(error) and "memory" in str(error):
                raise self._out_of_memory(train.accumulate) from error
            raise
        factor = rate_factor(parts.stage.schedule, cursor.step, parts.steps, batch_size=train.batch_size, samples=parts.samples)
        norm = self._norm()
        values = {"train/loss": result.loss, "train/grad_norm": norm, "train/lr": parts.optimizer.base_rate * factor, "wait": waited}
        values |= {f"train/{name}": loss for name, loss in result.losses.items()} if len(result.losses) > 1 else {}
        values |= {f"train/{name}": value for name, value in result.scalars.items()}
        if not (math.isfinite(result.loss) and math.isfinite(norm)):
            self._not_finite(result, list(batch.keys))
            return values
        self.skipped = 0
        if train.clip is not None and norm > train.clip:
            for parameter in parts.engine.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(train.clip / norm)
        parts.optimizer.step(factor)
        parts.engine.commit()
        parts.companions.after_step(parts.model)
        if parts.average is not None:
            parts.average.update(parts.model)
        return values

    def _norm(self) -> float:
        grads = [p.grad for p in self.parts.engine.parameters() if p.grad is not None]
        return float(torch.stack([g.float().norm() for g in grads]).norm()) if grads else 0.0

    def _not_finite(self, result: UpdateResult, keys: list[str]) -> None:
        """A loss that is NaN or infinite: stop, or skip the update and say which samples it had."""
        self.skipped += 1
        some = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        wrong = [f"{name!r} is {loss}" for name, loss in result.losses.items() if not math.isfinite(loss)]
        what = f"the loss of objective {', '.join(wrong)}" if wrong else f"the gradient of the loss ({result.loss:g}) is not finite"
        text = f"{what} at update {self.cursor.total + 1}; samples: {some}"
        if self.parts.stage.train.not_finite == "skip" and self.skipped < SKIP_LIMIT:
            self.note(f"{text}; skipped")
            return
        raise RunFailed(
            text,
            remedy='lower optimizer.lr, set train.clip = 1.0, or train.not_finite = "skip"; --resume continues from the last checkpoint',
        )

    def _out_of_memory(self, accumulate: int) -> OutOfMemory:
        return OutOfMemory(
            f"memory ran out at update {self.cursor.total + 1}",
            remedy=f"train.accumulate={accumulate * 2} gives the same result with about half the memory; train.recompute=true saves more",
        )
