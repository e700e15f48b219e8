"""The account of samples read and refused: counts by reason, the budget, the quarantine file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm.config.errors import DataError
from vlm.data.options import BadSamples
from vlm.data.samples import REASONS
from vlm.types.state import Tree

_NAMED = 5
_MAX_QUARANTINE = 64 * 1024 * 1024


class Ledger:
    """Counts over the whole run; the budget is held epoch by epoch, in which each sample occurs once."""

    def __init__(self, samples: int, policy: BadSamples) -> None:
        self.samples = samples
        self.policy = policy
        self.read = 0
        self.reasons: dict[str, int] = {}
        self.epoch = 0
        self.epoch_bad = 0
        self.epoch_good = 0
        self._first: list[str] = []

    @property
    def bad(self) -> int:
        return sum(self.reasons.values())

    def count(self, epoch: int, reason: str, key: Callable[[], str], part: int = 0) -> None:
        """Note one sample; an empty reason means that it is good. part: its source; here there is one.

        Raises DataError when the epoch has more bad samples than the budget allows, or nothing but bad ones.
        """
        if epoch != self.epoch:
            self._end_epoch()
            self.epoch, self.epoch_bad, self.epoch_good, self._first = epoch, 0, 0, []
        self.read += 1
        if not reason:
            self.epoch_good += 1
            return
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        self.epoch_bad += 1
        if len(self._first) < _NAMED:
            self._first.append(f"{key()}: {reason} ({REASONS[reason]})")
        if self.epoch_bad > self.policy.allowed(self.samples):
            self._over()

    def _end_epoch(self) -> None:
        if self.epoch_bad and not self.epoch_good:
            self._over()

    def _over(self) -> None:
        budget = (
            "the policy is to stop at the first"
            if self.policy.policy == "stop"
            else (f"the budget is {self.policy.budget:.2%} of an epoch, {self.policy.allowed(self.samples)}")
        )
        raise DataError(
            f"{self.epoch_bad} of {self.samples} samples are bad ({budget}); the first:\n  "
            + "\n  ".join(self._first),
            remedy="`vlm data check` counts them all; repair or remove them, or raise data.bad_samples.budget",
        )

    def state_dict(self) -> Tree:
        return {
            "read": self.read,
            "reasons": dict(sorted(self.reasons.items())),
            "epoch": self.epoch,
            "epoch_bad": self.epoch_bad,
            "epoch_good": self.epoch_good,
        }

    def load_state_dict(self, state: Tree) -> None:
        self.read, self.reasons = int(state["read"]), dict(state["reasons"])
        self.epoch, self.epoch_bad, self.epoch_good = state["epoch"], state["epoch_bad"], state["epoch_good"]
        self._first = []

    def report(self) -> dict[str, Any]:
        """Samples read, bad ones, and how many for each reason, over the whole run."""
        return {"read": self.read, "bad": self.bad, "reasons": dict(sorted(self.reasons.items()))}


class MixedLedger:
    """A ledger for each source of a mixture: each has its own epochs and its own budget."""

    def __init__(self, names: Sequence[str], samples: Sequence[int], policy: BadSamples) -> None:
        self.parts = {name: Ledger(count, policy) for name, count in zip(names, samples)}
        self._ordered = list(self.parts.values())

    def count(self, epoch: int, reason: str, key: Callable[[], str], part: int = 0) -> None:
        self._ordered[part].count(epoch, reason, key)

    def state_dict(self) -> Tree:
        return {name: ledger.state_dict() for name, ledger in self.parts.items()}

    def load_state_dict(self, state: Tree) -> None:
        for name, ledger in self.parts.items():
            ledger.load_state_dict(state[name])

    def report(self) -> dict[str, Any]:
        """The sums, and under `mixture` each source with its share of the good samples and its epoch."""
        reasons: Counter[str] = Counter()
        for ledger in self._ordered:
            reasons.update(ledger.reasons)
        good = {name: ledger.read - ledger.bad for name, ledger in self.parts.items()}
        total = sum(good.values())
        mixture = {
            name: {**ledger.report(), "share": good[name] / total if total else 0.0, "epoch": ledger.epoch}
            for name, ledger in self.parts.items()
        }
        return {
            "read": sum(ledger.read for ledger in self._ordered),
            "bad": sum(ledger.bad for ledger in self._ordered),
            "reasons": dict(sorted(reasons.items())),
            "mixture": mixture,
        }


class Quarantine:
    """`quarantine.jsonl`: one line {shard, key, reason, detail} for each bad sample, however often it is met."""

    def __init__(self, directory: str | os.PathLike[str] | None) -> None:
        self.path = Path(directory) / "quarantine.jsonl" if directory is not None else None
        self._seen: set[tuple[str, str]] = set()
        if self.path is not None and self.path.is_file() and self.path.stat().st_size <= _MAX_QUARANTINE:
            for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    self._seen.add((entry["shard"], entry["key"]))
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a crash cut short

    def add(self, name: str, reason: str, detail: str) -> None:
        shard, _, key = name.partition(":")
        if self.path is None or (shard, key) in self._seen:
            return
        self._seen.add((shard, key))
        entry: Mapping[str, str] = {"shard": shard, "key": key, "reason": reason, "detail": detail}
        line = (json.dumps(entry) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write to a file opened for appending: lines of several ranks do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)
