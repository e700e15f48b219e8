"""`vlm reproduce`: a preset's claim against its baseline, with paired seeds and intervals."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlm.cli.completion import complete_preset
from vlm.cli.output import echo_json, echo_result, log, table
from vlm.config.errors import ExitCode, RequestError

if TYPE_CHECKING:
    from vlm.workflows.reproduce.claim import Claim
    from vlm.workflows.reproduce.workspace import Workspace

_EPILOG = """\b
holds         the interval lies above 0 and the mean reaches the margin
fails         the interval lies below the margin: the effect is excluded, or reversed
not seen      the interval is around 0 and inside the margin
underpowered  the interval still reaches the margin: more seeds could decide
"""


@click.command(epilog=_EPILOG)
@click.argument("key", required=False, shell_complete=complete_preset)
@click.option("--seeds", type=click.IntRange(min=1), metavar="N", help="paired seeds [default: the claim's]")
@click.option("--all", "every", is_flag=True, help="measure every preset that makes a claim, the stalest first")
@click.option("--budget", metavar="TIME", help="stop before so much time is spent: 150m, 2h")
@click.option("--data", type=click.Choice(["real", "builtin"]), default="real", help="builtin: drawn scenes, labelled so")
@click.option(
    "--store", type=click.Path(path_type=Path), default=Path("runs/reproduce"), show_default=True,
    help="folder of unfinished runs, bases and caches",
)  # fmt: skip
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path("results"), show_default=True,
    help="folder of finished units and verdicts",
)  # fmt: skip
@click.option("--check-rig", is_flag=True, help="show that the rig sees a planted loss, and none in an arm against itself")
@click.option("--write-docs", is_flag=True, help="write docs/methods.md from the presets and the results, and stop")
@click.option("--dry-run", is_flag=True, help="list the units, and which are stored, and stop")
@click.option("--json", "as_json", is_flag=True, help="print the verdict as JSON on stdout")
def command(
    key: str | None, seeds: int | None, every: bool, budget: str | None, data: str, store: Path, results: Path,
    check_rig: bool, write_docs: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Measure a preset's claim against its baseline.

    Both arms are tuned alike on held-out concepts of the training data, then trained with paired seeds and scored on the
    claim's test data. Finished units are kept: the same command goes on where it was stopped.
    """
    if (key is not None and (every or write_docs)) or (key is None and not (every or check_rig or write_docs)):
        raise RequestError("name one preset, or give --all", remedy="vlm presets list shows them")
    from vlm.training.trainer import Interrupted
    from vlm.workflows.reproduce.store import Results
    from vlm.workflows.reproduce.workspace import BudgetSpent, Workspace

    if write_docs:
        from vlm.workflows.reproduce.page import methods_page

        path = Path("docs/methods.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(methods_page(Results(results)), encoding="utf-8")
        echo_result(str(path))
        return
    deadline = None
    if budget is not None:
        from vlm.workflows.reproduce.budget import seconds_of

        deadline = time.monotonic() + seconds_of(budget)
    workspace = Workspace(store, Results(results), _command_line(), log, deadline)
    try:
        _measure(_claims(key, every, check_rig, data), workspace, seeds, check_rig=check_rig, dry_run=dry_run, as_json=as_json, every=every)
    except Interrupted as signal:
        log("interrupted; the same command goes on from here")
        sys.exit(int(signal.code))
    except BudgetSpent as spent:
        log(f"stopped: {spent}")
        sys.exit(int(ExitCode.RUN_FAILED))


def _command_line() -> str:
    """The command as typed, without what is of this machine alone."""
    words, skip = ["vlm"], False
    for word in sys.argv[1:]:
        if skip:
            skip = False
        elif word in ("--store", "--results"):
            skip = True
        elif not word.startswith(("--store=", "--results=", "--json", "--debug")):
            words.append(word)
    return shlex.join(words)


def _claims(key: str | None, every: bool, check_rig: bool, data: str) -> list[Claim]:
    from vlm.config.catalogue import list_presets
    from vlm.workflows.reproduce.claim import claim_of, presets_with_claims
    from vlm.workflows.reproduce.rig import DEFAULT_CLAIM

    if every:
        return [claim_of(name, data) for name in presets_with_claims([entry.key for entry in list_presets()])]
    return [claim_of(key or DEFAULT_CLAIM, data)]


def _measure(
    claims: list[Claim], workspace: Workspace, seeds: int | None, *, check_rig: bool, dry_run: bool, as_json: bool, every: bool
) -> None:
    from vlm.workflows.reproduce import budget, page, rig
    from vlm.workflows.reproduce.measure import Measure

    def show(answer: dict[str, Any], text: str) -> None:
        if as_json:
            echo_json(answer, line=every)
        else:
            echo_result(text)

    if dry_run:
        for claim in claims:
            factor = Measure(claim, workspace).known_factor(claim.baseline)
            parts = list(rig.rig_claims(claim, factor).values()) if check_rig else [claim]
            plan = [entry for part in parts for entry in Measure(part, workspace, seeds).plan()]
            rows = [{"claim": claim.key, "unit": unit.describe(), "state": state, "key": unit.key[:12]} for unit, state in plan]
            show({"key": claim.key, "units": rows}, table([tuple(row.values()) for row in rows], ("CLAIM", "UNIT", "STATE", "KEY")))
    elif check_rig:
        for claim in claims:
            record = rig.check_rig(claim, workspace, seeds)
            show(record, page.rig_block(record))
            if not record["ok"]:
                sys.exit(int(ExitCode.GATE_FAILED))
    elif every:
        for answer in budget.measure_all(claims, workspace, seeds):
            show(answer, page.block(answer))
    else:
        answer = budget.measured(claims[0], workspace, seeds)
        show(answer, page.block(answer))
