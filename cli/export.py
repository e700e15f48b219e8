"""`vlm export`: a model to an ONNX bundle that is complete by itself."""

from __future__ import annotations

from pathlib import Path

import click

from vlm.cli.output import echo_json
from vlm.config.errors import RequestError


@click.command(name="export")
@click.argument("model", metavar="MODEL")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), metavar="DIR",
    help="directory of the bundle; an older bundle is replaced",
)
@click.option("--opset", type=click.IntRange(18, 24), default=18, show_default=True, help="ONNX operator set; 23 has the fused Attention")
@click.option("--name", help="name of the model in the bundle [default: the run's]")
@click.option("--json", "as_json", is_flag=True, help="print the report as one JSON object")
def command(model: str, output: Path, opset: int, name: str | None, as_json: bool) -> None:
    """Export a run or a Hugging Face directory to ONNX, preprocessing and tokenizer included.

    Every graph is compared with the model at several batch sizes and lengths, and whole pictures, texts and prompts go
    both ways. If anything differs, nothing is written and the exit code is 5.
    """
    from vlm.runtime.manifest import is_bundle

    if is_bundle(model):
        raise RequestError("is a bundle already", where=model, remedy="give the run or model directory it was made from")
    from vlm.export import export_bundle
    from vlm.export.publish import check_target
    from vlm.models import load_model

    check_target(output)  # before the work, not after it
    report = export_bundle(load_model(model), model, output, opset=opset, name=name)
    if as_json:
        echo_json(report)
        return
    click.echo(
        f"{report['output']}: {report['kind']} {report['name']}, {report['bytes'] / 1e6:.1f} MB, opset {report['opset']}; "
        f"{report['checks']} checks, least cosine {report['least_cosine']:.7f}"
    )
