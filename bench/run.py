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
    """One row: times in milliseconds, memory in MiB, `ratio` and `native_ratio` = peer time over ours."""
    torch.set_num_threads(threads)
    times = _times(case)
    native, dispatched, peer = times["native"], times["dispatched"], times.get("peer")
    return {
        "case": case.name,
        "native_ms": round(native * 1e3, 3),
        "dispatched_ms": round(dispatched * 1e3, 3),
        "peer": case.peer,
        "peer_ms": None if peer is None else round(peer * 1e3, 3),
        "ratio": None if peer is None else round(peer / dispatched, 3),
        "native_ratio": None if peer is None else round(peer / native, 3),
        "target": case.target,
        "ours_peak_mb": _rounded(memory.peak(case, "native", threads)) if with_memory else None,
        "peer_peak_mb": _rounded(memory.peak(case, "peer", threads)) if with_memory and case.runs_peer else None,
        "threads": threads,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)


def _times(case: Case) -> dict[Arm, float]:
    arms = {arm: work for arm, work in case.build().items() if arm != "peer" or case.runs_peer}
    first = {arm: _time(work) for arm, work in arms.items()}
    if sum(first.values()) > SHORT_SECONDS * len(arms):  # minutes of work: the warm-up was the measurement
        return first
    repeats = max(1, min(25, int(BUDGET_SECONDS / sum(first.values()))))
    samples: dict[Arm, list[float]] = {arm: [] for arm in arms}
    for _ in range(repeats):
        for arm, work in arms.items():
            samples[arm].append(_time(work))
    return {arm: median(values) for arm, values in samples.items()}


def _time(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure_all(name: str | None, threads: int, with_memory: bool = True) -> Iterator[dict[str, object]]:
    for case in selected(name):
        yield measure(case, threads, with_memory)
