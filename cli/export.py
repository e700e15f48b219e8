"""`vlm export`: a model to an ONNX bundle that is complete by itself."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

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
@click.option("--quantize", type=click.Choice(["int8"]), help="int8 weights: a quarter of the size; MODEL may also be a float bundle")
@click.option(
    "--least-cosine", type=click.FloatRange(0, 1), default=0.99, show_default=True,
    help="with --quantize: the least that it may agree with the float model",
)
@click.option("--json", "as_json", is_flag=True, help="print the report as one JSON object")
def command(model: str, output: Path, opset: int, name: str | None, quantize: str | None, least_cosine: float, as_json: bool) -> None:
    """Export a run or a Hugging Face directory to ONNX, preprocessing and tokenizer included.

    Every graph is compared with the model at several batch sizes and lengths, and whole pictures, texts and prompts go
    both ways. If anything differs, nothing is written and the exit code is 5. With --quantize the same holds below
    --least-cosine; `vlm evaluate` of both bundles says what it costs on your data.
    """
    from vlm.export.publish import check_target
    from vlm.runtime.manifest import is_bundle

    check_target(output)  # before the work, not after it
    if not is_bundle(model):
        report = _exported(model, output, opset, name, quantize, least_cosine)
    elif quantize is None:
        raise RequestError("is a bundle already", where=model, remedy="give the run or model directory it was made from, or --quantize int8")
    elif name is not None:
        raise RequestError("a bundle keeps its name", where="--name", remedy="export the run under another name")
    else:
        from vlm.export.quantise import quantise_bundle

        report = quantise_bundle(model, output, least_cosine=least_cosine)
    if as_json:
        echo_json(report)
        return
    small = f" (int8; {report['bytes_before'] / 1e6:.1f} MB before)" if "bytes_before" in report else ""
    same = f", same best token in {report['same_token']:.0%} of the steps" if "same_token" in report else ""
    click.echo(
        f"{report['output']}: {report['kind']} {report['name']}, {report['bytes'] / 1e6:.1f} MB{small}, opset {report['opset']}; "
        f"{report['checks']} checks, least cosine {report['least_cosine']:.7f}{same}"
    )


def _exported(model: str, output: Path, opset: int, name: str | None, quantize: str | None, least_cosine: float) -> dict[str, Any]:
    from vlm.export import export_bundle, quantise_bundle
    from vlm.models import load_model

    if quantize is None:
        return export_bundle(load_model(model), model, output, opset=opset, name=name)
    with tempfile.TemporaryDirectory() as place:
        report = export_bundle(load_model(model), model, Path(place) / "bundle", opset=opset, name=name)
        return quantise_bundle(Path(place) / "bundle", output, least_cosine=least_cosine) | {"parity": report["parity"]}
