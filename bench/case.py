"""What a measured case is: our work beside a peer's, on the same inputs.

A case of an operator has three arms: `native` (the kernel), `dispatched` (what `vlm.ops` picks by itself) and `peer`; a
case of a whole model may lack `native`. An arm is a function without arguments that does the whole work once, gradients
included where the case says so, and returns the tensors that the caller would keep, which are not counted as memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vlm import ops

Arm = str
"""`native`, `dispatched`, `peer`, or the name of a part of the work that is timed beside them."""
Work = Callable[[], object]
Account = Callable[[Mapping[Arm, float]], Mapping[str, object]]
PEER_MEMORY_LIMIT = 12 * 2**30
"""A peer that would need more than this many bytes is not run."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    target: the least ratio that we set out to reach, None where none was set: `native_ratio` of a case with an arm
    `native`, `ratio` of one without. account: what else is to be told, from the median seconds of the arms; its
    `target` takes the place of the case's. repeats: how often the arms are run after a warm-up, None: as often as the budget lets.
    memory: why the peak memory is not measured; empty where it is.
    """

    name: str
    peer: str
    build: Callable[[], dict[Arm, Work]]
    target: float | None = None
    peer_bytes: int = 0
    native: bool = True
    account: Account | None = None
    repeats: int | None = None
    memory: str = ""

    @property
    def runs_peer(self) -> bool:
        return self.peer_bytes <= PEER_MEMORY_LIMIT

    @property
    def ours(self) -> Arm:
        """The arm that stands for us."""
        return "native" if self.native else "dispatched"


def with_backend(name: ops.Backend, work: Work) -> Work:
    """The work with every operator forced to one side."""

    def run() -> object:
        with ops.backend(name):
            return work()

    return run
