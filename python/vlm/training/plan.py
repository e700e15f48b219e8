"""What a run will do, before it starts: parameters, memory, disk and time."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vlm.config.machine import usable_cores
from vlm.ops import keep_freed_memory
from vlm.training.engine import Clock
from vlm.training.timing import Moment, Timed, at_size, read_clock
from vlm.training.trainer import Parts
from vlm.types import Batch

PROBES = (64, 16, 4)
"""Samples of the measured micro-batch: the first that the batch has and that takes no longer than `PATIENCE`."""

PATIENCE = 6.0
"""Seconds."""

REPEATS = 5
"""Timed updates of each size, after one that is left out."""

ALONE = 0.9
"""Share of its time in which the process ran, from which on other work is not worth a word."""

HEAP = 1.18
"""What a run holds for each byte that the measurement held: its heap has more holes, and they differ from run to run.
Fitted to clip-tiny, 10 settings of batch, accumulation and recomputation, whose whole growth was 1.02 to 1.31 of the measured."""


@dataclass(frozen=True)
class Plan:
    """One stage. Sizes in bytes, times in seconds.

    seconds_range: of an update, from the least and the greatest times that were measured. ran: share of the measured time in which the
    process had a core; the rest went to other work on the machine.
    """

    stage: str
    parameters: int
    trainable: int
    groups: dict[str, int]
    steps: int
    batch_size: int
    micro_batch: int
    samples_per_epoch: int | None
    memory: dict[str, int]
    disk: dict[str, int]
    disk_free: int
    seconds: float
    seconds_per_step: float
    seconds_range: tuple[float, float]
    ran: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        share = self.trainable / max(1, self.parameters)
        peak = sum(self.memory.values())
        return [
            f"stage {self.stage}: {self.steps} updates of {self.batch_size} samples"
            + (f" ({self.steps * self.batch_size / self.samples_per_epoch:.1f} epochs)" if self.samples_per_epoch else ""),
            f"parameters: {self.parameters:,}, {share:.0%} trainable  "
            + "  ".join(f"{name} {count:,}" for name, count in self.groups.items()),
            f"memory: about {size(peak)}  " + "  ".join(f"{name} {size(bytes_)}" for name, bytes_ in self.memory.items()),
            f"disk: about {size(sum(self.disk.values()))} of {size(self.disk_free)} free  "
            + "  ".join(f"{name} {size(bytes_)}" for name, bytes_ in self.disk.items()),
            f"time: about {duration(self.seconds)} ({self.seconds_per_step:.2f} s an update, "
            f"{self.seconds_range[0]:.2f} to {self.seconds_range[1]:.2f} measured)",
            *self._slowed(),
        ]

    def _slowed(self) -> list[str]:
        if self.ran >= ALONE:
            return []
        return [
            f"other work on this machine took {1 - self.ran:.0%} of the measured time: alone about {duration(self.seconds * self.ran)}"
        ]


def size(number: float) -> str:
    """1536 -> 1.5 KiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"


def duration(seconds: float) -> str:
    """3700 -> 1 h 2 min"""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, ValueError):
        return 0


def make_plan(parts: Parts, output: str, *, before: int = 0) -> Plan:
    """Measure small updates on real data and extrapolate them to the stage.

    before: `resident()` as it was before the stage was assembled: the interpreter and its libraries.

    Not seen: evaluation and checkpoints; data that workers decode slower than the model learns, beyond the second
    batch; terms that grow with the square of the batch (a batch-scope loss holds tiles of its B x B logits, small
    beside the activations); longer texts than those of the first batch. With `train.recompute` the holes of the heap
    outweigh what is held, and two runs differ by a fifth: there the memory is good to a third, elsewhere to 15 %.
    """
    train, scale = parts.stage.train, parts.stage.scale
    processes = max(scale.processes, parts.engine.communicator.size)
    share = -(-train.batch_size // processes)
    micro = -(-share // train.accumulate)
    torch.set_num_threads(scale.threads or max(1, usable_cores() // processes))
    measured = _Measured(parts)
    parameters = list(parts.model.parameters())
    model_size = sum(p.numel() for p in parameters)
    total = model_size + sum(p.numel() for p in parts.objectives.parameters())  # of heads, too
    trainable = sum(p.numel() for p in parts.engine.parameters())
    groups: dict[str, int] = {}
    for name, parameter in parts.model.named_parameters():
        top = name.partition(".")[0]
        groups[top] = groups.get(top, 0) + parameter.numel()
    slots = 2 if parts.stage.optimizer.kind == "adamw" else 1
    others = [member for member in parts.companions.members.values() if not member.live]
    sizes = {member.name: 4 * sum(p.numel() for p in member.model.parameters()) for member in others}
    memory = {
        "weights": 4 * total,
        **({"companions": sum(sizes.values())} if others else {}),
        "gradients": 4 * trainable,
        "optimiser": 4 * slots * trainable,
    }
    held = measured.still - memory["optimiser"] - memory["weights"] - sum(sizes.values())  # the process between two updates
    libraries = min(before, held) or held
    memory["data"] = held - libraries
    memory["activations"] = measured.activations(micro, train.accumulate, memory["gradients"])
    memory["libraries"] = libraries
    if parts.steps == 0:  # the optimiser makes its state at its first step
        memory |= {"gradients": 0, "optimiser": 0, "activations": 0}
        slots = 0
    per_step, *around = (measured.seconds(micro, train.accumulate, of) for of in (Timed.median, Timed.least, Timed.greatest))
    checkpoint = 4 * total + 4 * slots * trainable + sum(sizes[member.name] for member in others if member.stateful)
    disk = {"checkpoints": checkpoint * max(1, train.keep or 1), "model": 4 * model_size}
    return Plan(
        stage=parts.stage.name,
        parameters=total,
        trainable=trainable,
        groups=groups,
        steps=parts.steps,
        batch_size=train.batch_size,
        micro_batch=micro,
        samples_per_epoch=parts.samples,
        memory=memory,
        disk=disk,
        disk_free=shutil.disk_usage(_existing(output)).free,
        seconds=per_step * parts.steps,
        seconds_per_step=per_step,
        seconds_range=(min(per_step, around[0]), max(per_step, around[1])),
        ran=measured.ran,
    )


class _Measured:
    """Updates of one micro-batch (two when the stage accumulates, so that the replay is part of it) at two sizes.

    The optimiser steps with rate 0: its state is allocated, the weights stay. Activations are taken to grow in
    proportion to the micro-batch, time as a straight line. Times are medians of updates after the first of their size.
    """

    def __init__(self, parts: Parts, clock: Callable[[], Moment] = read_clock) -> None:
        self.parts, self.clock = parts, clock
        self.together = 1 if parts.stage.train.accumulate == 1 else 2
        self.wait = Timed()
        self.batch = self._next()
        if parts.stage.data.workers or self.wait.median() < PATIENCE / 4:  # the first one opens files and starts workers
            self.wait = Timed()
            self._next()
        self.bytes = _bytes_of(self.batch) / len(self.batch)
        room = max(1, min(-(-parts.stage.train.batch_size // parts.stage.train.accumulate), len(self.batch) // self.together))
        least = min(room, PROBES[-1])
        # The first calls allocate and load. What they free leaves the heap as clean as a run finds it, because what an
        # update holds afterwards depends on the holes in it.
        _give_back_freed_memory()
        self._update(least)
        # By the time on a core: where other work takes most of it, a few samples would say little of a whole batch.
        each = sum(part.ran_for for part in self._update(least)[:2]) / least
        sizes = [size for size in (min(room, size) for size in PROBES) if size * each * (REPEATS + 1) < PATIENCE]
        self.size = sizes[0] if sizes else least
        parts.optimizer.zero_grad()
        self.still = resident()
        keep_freed_memory()  # from here on as a run
        self.top = 0
        gradients, self.step = self._measure(self.size)
        self.points = [(self.size, gradients)]
        if self.size > 1:
            small = -(-self.size // 4)
            self.points.insert(0, (small, self._measure(small)[0]))

    @property
    def ran(self) -> float:
        """Share of the timed updates in which this thread had a core."""
        return Timed([one for _, timed in self.points for one in timed.readings] + self.step.readings).ran

    def _next(self) -> Batch:
        started = self.clock()
        batch = next(self.parts.loader)
        self.wait.add(self.clock() - started)
        return batch

    def _measure(self, size: int) -> tuple[Timed, Timed]:
        """(gradients, step) of `REPEATS` updates, fewer when they take too long; the first of a size touches its memory and is left out."""
        gradients, step = Timed(), Timed()
        for repeat in range(REPEATS + 1):
            first, second, top = self._update(size)
            self.top = max(self.top, top) if size == self.size else self.top
            if repeat:
                gradients.add(first)
                step.add(second)
            if len(gradients) >= 2 and gradients.seconds + step.seconds > PATIENCE:
                break
        return gradients, step

    def _update(self, size: int) -> tuple[Moment, Moment, int]:
        _reset_peak()
        parts = self.parts
        parts.model.train()
        parts.optimizer.zero_grad()
        started = self.clock()
        parts.engine.update([self.batch.samples(i * size, (i + 1) * size) for i in range(self.together)], Clock(0, parts.steps))
        between = self.clock()
        parts.optimizer.step(0.0)
        return between - started, self.clock() - between, _peak()

    def activations(self, micro: int, accumulate: int, gradients: int) -> int:
        """Bytes beyond weights, gradients and optimiser state at the peak of a whole update.

        All its micro-batches are cut from the batch beforehand."""
        copies = (accumulate - self.together) * micro * self.bytes
        return round(HEAP * max(0, self.top - self.still - gradients) * micro / self.size + copies)

    def seconds(self, micro: int, accumulate: int, of: Callable[[Timed], float] = Timed.median) -> float:
        """Of a whole update, the wait for its data included; of: which of the measured times are taken."""
        gradients = at_size([(size, of(timed)) for size, timed in self.points], micro)
        update, wait = gradients * accumulate / self.together + of(self.step), of(self.wait)
        return max(update, wait) if self.parts.stage.data.workers else update + wait


def _bytes_of(batch: Batch) -> int:
    tensors = [value for stream in batch.streams.values() for value in vars(stream).values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def _give_back_freed_memory() -> None:
    """Tell glibc to take large blocks from the system and give them back at once."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 64 * 1024)


_M_MMAP_THRESHOLD = -3


def _reset_peak() -> None:
    """Linux forgets the peak of the process at this word; elsewhere the peak of its whole life is used."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def _peak() -> int:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("ascii"))
        if found is not None:
            return int(found[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _existing(path: str) -> str:
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return str(folder)
