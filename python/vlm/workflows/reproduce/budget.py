"""Which claim to measure next when there is time for some only: what was never measured, then what is stalest."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from vlm.config.errors import DataError, RequestError
from vlm.workflows.reproduce.claim import Claim
from vlm.workflows.reproduce.measure import Measure
from vlm.workflows.reproduce.workspace import BudgetSpent, Workspace

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(text: str) -> float:
    """`150m`, `90s`, `2h`, or both `1h30m`. Raises RequestError."""
    if not re.fullmatch(r"(\d+(\.\d+)?[smh])+", text):
        raise RequestError(f"{text!r} is no length of time", remedy="expected for example 150m, 90s or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([smh])", text))


def stalest_first(claims: Sequence[Claim], workspace: Workspace, seeds: int | None = None) -> list[Claim]:
    """Claims with something to do: those never judged on these data first, then by the age of their newest verdict.

    A claim has nothing to do when it was judged and every unit of that judgement is what would be trained today.
    """
    waiting: list[tuple[str, int, Claim]] = []
    for place, claim in enumerate(claims):
        latest = workspace.results.latest(claim.key, claim.data)
        if latest is None:
            waiting.append(("", place, claim))
        elif _has_work(claim, workspace, seeds):
            waiting.append((latest["finished"], place, claim))
    return [claim for _, _, claim in sorted(waiting, key=lambda entry: entry[:2])]


def _has_work(claim: Claim, workspace: Workspace, seeds: int | None) -> bool:
    """Whether a unit is missing; so it is where the data cannot even be read, which measuring will say."""
    try:
        current = Measure(claim, workspace, seeds).plan()
    except DataError:
        return True
    return any(state != "stored" for unit, state in current if unit.phase != "base")


def measure_all(claims: Sequence[Claim], workspace: Workspace, seeds: int | None = None) -> Iterator[dict[str, Any]]:
    """Measures claim after claim until the workspace's deadline; gives each verdict as it is stored.

    A claim whose data are absent is told and passed over; at the end the first such DataError goes up.
    """
    absent: DataError | None = None
    for claim in stalest_first(claims, workspace, seeds):
        try:
            yield measured(claim, workspace, seeds)
        except DataError as error:
            workspace.note(f"{claim.key} is passed over: {error}")
            absent = absent or error
        except BudgetSpent as spent:
            workspace.note(f"stopped: {spent}")
            break
    if absent is not None:
        raise absent


def measured(claim: Claim, workspace: Workspace, seeds: int | None = None) -> dict[str, Any]:
    """One claim from beginning to stored verdict."""
    answer = Measure(claim, workspace, seeds).run().to_json(workspace.command)
    workspace.results.add_verdict(claim.key, answer)
    return answer
