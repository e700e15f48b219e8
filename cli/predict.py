"""`vlm predict`: which label fits a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from vlm.config.errors import ExitCode, RequestError

if TYPE_CHECKING:
    import numpy as np

    from vlm.runtime.embedder import Form


@click.command(name="predict")
@click.argument("model", metavar="MODEL")
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True)
@click.option("--labels", metavar="A,B,C", help="labels, separated by commas; @FILE reads one a line [default: the run's trained head]")
@click.option("--template", default="{}", show_default=True, help="text of a label, {} stands for it")
@click.option("-k", "--top", type=click.IntRange(min=1), default=5, show_default=True, help="labels to show of each picture")
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a picture, with every label")
def command(
    model: str, images: tuple[str, ...], labels: str | None, template: str, top: int, threads: int | None, as_json: bool
) -> None:
    """Score pictures with labels that are given as text, or with the head that a run has trained.

    MODEL is a run, a Hugging Face directory or a bundle; IMAGE a path, or - for a picture on stdin. Without --labels
    a run of `vlm finetune linear-probe`, or a model with classes (`model.classes`), answers with its own head. A picture that cannot be read is
    named, and the exit code is then 3.
    """
    if "{}" not in template:
        raise RequestError("expected {} where the label goes", where="--template", remedy="for example 'a photo of a {}'")
    names, score, form, head = _scorer(model, labels, template, threads)

    from vlm.runtime.embedder import probabilities
    from vlm.runtime.pictures import BadPicture

    failed = 0
    for image in images:
        try:
            values = score(sys.stdin.buffer.read(_MAX_STDIN) if image == "-" else image)
        except BadPicture as error:
            failed += 1
            if as_json:
                print(json.dumps({"input": image, "error": error.message}), flush=True)
            click.echo(f"error: {error}", err=True)
            continue
        chances = probabilities(values, form)[0]
        order = sorted(range(len(names)), key=lambda i: -values[0, i])
        found = [{"label": names[i], "score": float(values[0, i]), "probability": float(chances[i])} for i in order]
        if as_json:
            print(json.dumps({"input": image, "form": form, "head": head, "predictions": found}), flush=True)
        else:
            print(image)
            for entry in found[:top]:
                print(f"  {entry['probability']:7.2%}  {entry['label']}", flush=True)
    if failed:
        sys.exit(int(ExitCode.WRONG_DATA))


def _scorer(
    model: str, labels: str | None, template: str, threads: int | None
) -> tuple[list[str], Callable[[Any], np.ndarray], Form, str | None]:
    """(labels, picture -> scores [1, labels], their form, the head's name or None)."""
    from vlm.cli.encoders import open_embedder
    from vlm.cli.heads import has_head, read_head

    if labels is not None:
        from vlm.runtime.embedder import scores

        names = _labels(labels)
        embedder = open_embedder(model, threads=threads)
        texts = embedder.encode_text([template.replace("{}", name) for name in names])
        return names, lambda picture: scores(embedder, embedder.encode_image([picture]), texts), embedder.form, None
    embedder = open_embedder(model, threads=threads)
    classifier: Any = embedder
    if getattr(classifier, "classes", ()):
        if template != "{}":
            raise RequestError("--template has no use without --labels: a trained head reads no texts")
        return list(classifier.classes), lambda picture: classifier.classify([picture]), "softmax", "model"
    if not has_head(model):
        raise RequestError(
            "no labels given, and this model has no trained head",
            where=model,
            remedy='name them: --labels "cat,dog"; or train a head: vlm finetune linear-probe --model DIR data.label=FIELD',
        )
    if template != "{}":
        raise RequestError("--template has no use without --labels: a trained head reads no texts")
    head = read_head(model)
    return head.classes, lambda picture: head.scores(embedder, picture), "softmax", head.name


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
