"""`vlm report`: the page of a run."""

from __future__ import annotations

from pathlib import Path

import click

from vlm.cli.output import check_writable, echo_json, echo_result


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), metavar="FILE", help="the page [default: RUN/report.html]"
)
@click.option("--json", "as_json", is_flag=True, help="print what the page is made of as one JSON object")
def command(run: Path, output: Path | None, as_json: bool) -> None:
    """Write the HTML report of a run: one page, nothing loaded from elsewhere. The card of its model (RUN/model/README.md)
    is brought up to date."""
    from vlm.cli.training_job import refuse_bundle
    from vlm.reporting import read_run, write_card, write_report

    refuse_bundle(run)
    if output is not None:
        check_writable(output)
    path = write_report(run, output)
    write_card(run)
    if as_json:
        echo_json({"report": str(path), **read_run(run).summary()})
    else:
        echo_result(str(path))
