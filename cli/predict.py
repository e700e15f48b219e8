"""`vlm predict`: which label fits a picture."""

from __future__ import annotations

import json
import sys

import click

from vlm.config.errors import RequestError


@click.command(name="predict")
@click.argument("model", metavar="MODEL")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--labels", required=True, metavar="A,B,C", help="labels, separated by commas; @FILE reads one a line")
@click.option("--template", default="{}", show_default=True, help="text of a label, {} stands for it")
@click.option("-k", "--top", type=click.IntRange(min=1), default=5, show_default=True, help="labels to show of each picture")
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a picture, with every label")
def command(model: str, images: tuple[str, ...], labels: str, template: str, top: int, threads: int | None, as_json: bool) -> None:
    """Score pictures with labels that are given as text.

    MODEL is a run, a Hugging Face directory or a bundle; IMAGE a path, or - for a picture on stdin.
    """
    names = _labels(labels)
    if "{}" not in template:
        raise RequestError("expected {} where the label goes", where="--template", remedy="for example 'a photo of a {}'")

    from vlm.cli.encoders import open_embedder
    from vlm.runtime.embedder import probabilities, scores

    embedder = open_embedder(model, threads=threads)
    texts = embedder.encode_text([template.replace("{}", name) for name in names])
    for image in images:
        vector = embedder.encode_image([sys.stdin.buffer.read(_MAX_STDIN) if image == "-" else image])
        values = scores(embedder, vector, texts)
        chances = probabilities(values, embedder.form)[0]
        order = sorted(range(len(names)), key=lambda i: -values[0, i])
        found = [{"label": names[i], "score": float(values[0, i]), "probability": float(chances[i])} for i in order]
        if as_json:
            print(json.dumps({"input": image, "form": embedder.form, "predictions": found}), flush=True)
        else:
            print(image)
            for entry in found[:top]:
                print(f"  {entry['probability']:7.2%}  {entry['label']}", flush=True)


_MAX_STDIN = 64 * 2**20


def _labels(given: str) -> list[str]:
    if given.startswith("@"):
        from vlm.cli.streams import read_lines

        names = [line.decode("utf-8", "replace").strip() for line in read_lines(given[1:])]
    else:
        names = [name.strip() for name in given.split(",")]
    names = [name for name in names if name]
    if not names:
        raise RequestError("no label given", where="--labels", remedy='for example --labels "cat,dog"')
    return names
