"""Measure cases: arms interleaved within a case, medians, memory in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from vlm.bench import memory
from vlm.bench.cases import CASES, Arm, Case

BUDGET_SECONDS = 6.0
"""Time for the repeats of one case; there are at least one (after a warm-up, for short cases) and at most 25."""
SHORT_SECONDS = 5.0


def selected(name: str | None) -> list[Case]:
    """Cases whose name holds `name`."""
    return [case for case in CASES if name is None or name in case.name]


def measure(case: Case, threads: int, with_memory: bool = True) -> dict[str, object]:
    """One row: times in milliseconds, memory in MiB, `ratio` and `native_ratio` = peer time over ours.

    `native_cpu_ratio` is the same of the processor time of all threads, of `dispatched` where there is no kernel's arm:
    what is left of a figure on a busy machine. `details`: what the case's account tells and why memory was not measured, or
    None.
    """
    torch.set_num_threads(threads)
    measured = _times(case)
    times = {arm: wall for arm, (wall, _) in measured.items()}
    native, dispatched, peer = times.get("native"), times["dispatched"], times.get("peer")
    details = dict(case.account(times)) if case.account is not None else None
    with_memory = with_memory and not case.memory
    if case.memory:
        details = {**(details or {}), "memory_not_measured": case.memory}
    return {
        "case": case.name,
        "native_ms": _milliseconds(native),
        "dispatched_ms": _milliseconds(dispatched),
        "peer": case.peer,
        "peer_ms": _milliseconds(peer),
        "ratio": _ratio(peer, dispatched),
        "native_ratio": _ratio(peer, native),
        "native_cpu_ratio": None if peer is None else _ratio(measured["peer"][1], max(measured[case.ours][1], 1e-9)),
        "target": case.target if details is None else details.pop("target", case.target),
        "ours_peak_mb": _rounded(memory.peak(case, case.ours, threads)) if with_memory else None,
        "peer_peak_mb": _rounded(memory.peak(case, "peer", threads)) if with_memory and case.runs_peer else None,
        "threads": threads,
        "details": details,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1e3, 3)


def _ratio(peer: float | None, ours: float | None) -> float | None:
    return None if peer is None or ours is None else round(peer / ours, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _times(case: Case) -> dict[Arm, tuple[float, float]]:
    """Median wall and processor seconds of every arm."""
    arms = {arm: work for arm, work in case.build().items() if arm != "peer" or case.runs_peer}
    first = {arm: _time(work) for arm, work in arms.items()}
    spent = sum(wall for wall, _ in first.values())
    if case.repeats is None and spent > SHORT_SECONDS * len(arms):  # minutes of work: the warm-up was the measurement
        return first
    repeats = case.repeats or max(1, min(25, int(BUDGET_SECONDS / spent)))
    samples: dict[Arm, list[tuple[float, float]]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, work in arms.items():
            samples[arm].append(_time(work))
    return {arm: (median(w for w, _ in values), median(c for _, c in values)) for arm, values in samples.items()}


def _time(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds, all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_all(name: str | None, threads: int, with_memory: bool = True) -> Iterator[dict[str, object]]:
    for case in selected(name):
        yield measure(case, threads, with_memory)
