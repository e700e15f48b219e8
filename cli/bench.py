"""`vlm bench`: the operators against their named peers."""

from __future__ import annotations

import click

from vlm.cli.output import echo_json, echo_result, log


@click.command()
@click.argument("name", required=False)
@click.option("--threads", type=click.IntRange(min=1), help="Threads for both sides; as many as torch takes by default.")
@click.option("--no-memory", is_flag=True, help="Do not measure peak memory (a process of its own for each figure).")
@click.option("--keep-memory", is_flag=True, help="Freed memory stays with the process, for both sides: large results cost no page faults.")
@click.option("--list", "list_only", is_flag=True, help="Print the names of the cases and stop.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array on stdout.")
def command(name: str | None, threads: int | None, no_memory: bool, keep_memory: bool, list_only: bool, as_json: bool) -> None:
    """Measure the cases whose name contains NAME, or all of them.

    Each case runs our kernel, what `vlm.ops` picks by itself and the peer in turn, in one process, and reports
    medians; ratios are peer time over ours. Peak memory is beyond inputs and returned gradients.
    """
    import torch

    from vlm.bench.run import measure, selected
    from vlm.bench.table import markdown
    from vlm.config.errors import RequestError
    from vlm.ops import keep_freed_memory

    cases = selected(name)
    if not cases:
        raise RequestError(f"no benchmark case contains {name!r}", remedy="vlm bench --list prints their names")
    if list_only and as_json:
        echo_json([case.name for case in cases])
        return
    if list_only:
        echo_result("\n".join(case.name for case in cases))
        return
    if keep_memory:
        keep_freed_memory()
    rows = []
    for number, case in enumerate(cases, 1):
        log(f"[{number}/{len(cases)}] {case.name}")
        rows.append(measure(case, threads or torch.get_num_threads(), with_memory=not no_memory))
    if as_json:
        echo_json(rows)
    else:
        echo_result(markdown(rows))
