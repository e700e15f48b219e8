"""What a run will do, before it starts: parameters, memory, disk and time."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks

from vlm.training.engine import Clock
from vlm.training.trainer import Parts

PROBE = 8
"""Samples of the measured micro-batch."""


@dataclass(frozen=True)
class Plan:
    """One stage. Sizes in bytes, times in seconds."""

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
            f"time: about {duration(self.seconds)} ({self.seconds_per_step:.2f} s an update)",
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


def make_plan(parts: Parts, output: str) -> Plan:
    """Measure one small update on real data and scale it to the whole stage."""
    train = parts.stage.train
    processes = max(1, parts.engine.communicator.size)
    share = -(-train.batch_size // processes)
    micro = -(-share // train.accumulate)
    batch = next(parts.loader)
    probe = batch.samples(0, min(PROBE, len(batch)))
    parts.engine.update([probe.samples(0, 1)], Clock(0, parts.steps))  # warm-up: first calls allocate
    parts.optimizer.zero_grad()
    stored: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    started = time.perf_counter()
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        parts.engine.update([probe], Clock(0, parts.steps))
    elapsed = time.perf_counter() - started
    parts.optimizer.zero_grad()
    weights = {p.data_ptr() for p in parts.model.parameters()}
    activations = sum(n for address, n in stored.items() if address not in weights)
    parameters = list(parts.model.parameters())
    total = sum(p.numel() for p in parameters)
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
        "activations": round(activations / len(probe) * micro),
        "libraries": 600 * 2**20,
    }
    replays = 1 if train.accumulate == 1 or not parts.engine.per_batch else 4 / 3
    per_step = elapsed / len(probe) * share * replays
    checkpoint = 4 * total + 4 * slots * trainable + sum(sizes[member.name] for member in others if member.stateful)
    disk = {"checkpoints": checkpoint * max(1, train.keep or 1), "model": 4 * total}
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
    )


def _existing(path: str) -> str:
    from pathlib import Path

    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return str(folder)
