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
@click.option("--template", help="text of a label, {} stands for it [default: the prompt that the model has learned, else {}]")
@click.option("--descriptors", metavar="FILE", help="JSON: label -> what can be seen of it; scores by these, and says which fit")
@click.option(
    "--reduce",
    type=click.Choice(("score-mean", "score-max", "embedding-mean")),
    help="how a label's descriptors become one score [default: score-mean]",
)
@click.option("--why", type=click.IntRange(min=0), default=3, show_default=True, help="descriptors to show of a picture's first label")
@click.option("-k", "--top", type=click.IntRange(min=1), default=5, show_default=True, help="labels to show of each picture")
@click.option("--threads", type=click.IntRange(min=1), help="threads of one operator")
@click.option("--json", "as_json", is_flag=True, help="one JSON object a picture, with every label")
def command(
    model: str,
    images: tuple[str, ...],
    labels: str | None,
    template: str | None,
    descriptors: str | None,
    reduce: str | None,
    why: int,
    top: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Score pictures with labels that are given as text, or with the head that a run has trained.

    MODEL is a run, a Hugging Face directory or a bundle; IMAGE a path, or - for a picture on stdin. Without --labels
    a run of `vlm finetune linear-probe`, or a model with classes (`model.classes`), answers with its own head. --descriptors also
    names the labels where --labels does not, and each answer comes with the descriptors that speak for it. A picture that
    cannot be read is named, and the exit code is then 3.
    """
    if template is not None and "{}" not in template:
        raise RequestError("expected {} where the label goes", where="--template", remedy="for example 'a photo of a {}'")
    if reduce is not None and descriptors is None:
        raise RequestError("--reduce has no use without --descriptors: a label has one text")
    names, score, form, head = _scorer(model, labels, template, threads, descriptors, reduce)

    from vlm.runtime.embedder import probabilities
    from vlm.runtime.pictures import BadPicture

    failed = 0
    for image in images:
        try:
            values, reasons = score(sys.stdin.buffer.read(_MAX_STDIN) if image == "-" else image)
        except BadPicture as error:
            failed += 1
            if as_json:
                print(json.dumps({"input": image, "error": error.message}), flush=True)
            click.echo(f"error: {error}", err=True)
            continue
        chances = probabilities(values, form)[0]
        order = sorted(range(len(names)), key=lambda i: -values[0, i])
        found: list[dict[str, Any]] = [{"label": names[i], "score": float(values[0, i]), "probability": float(chances[i])} for i in order]
        if reasons is not None:
            found = [entry | {"why": reasons(i)} for entry, i in zip(found, order)]
        if as_json:
            print(json.dumps({"input": image, "form": form, "head": head, "predictions": found}), flush=True)
        else:
            print(image)
            for entry in found[:top]:
                print(f"  {entry['probability']:7.2%}  {entry['label']}", flush=True)
                for reason in entry.get("why", ())[: why if entry is found[0] else 0]:
                    print(f"           {reason['score']:6.3f}  {reason['text']}", flush=True)
    if failed:
        sys.exit(int(ExitCode.WRONG_DATA))


Why = Callable[[int], list[dict[str, Any]]]
"""Number of a label -> its texts with their cosine, best first."""


def _scorer(
    model: str, labels: str | None, template: str | None, threads: int | None, descriptors: str | None, reduce: str | None
) -> tuple[list[str], Callable[[Any], tuple[np.ndarray, Why | None]], Form, str | None]:
    """(labels, picture -> scores [1, labels] and what speaks for them, their form, the head's name or None)."""
    from vlm.cli.encoders import open_embedder
    from vlm.cli.heads import has_head, read_head
    from vlm.runtime.prompt import plain_name, prompt_of

    if descriptors is not None:
        return _by_descriptors(model, labels, template, threads, descriptors, reduce)
    embedder = open_embedder(model, threads=threads)
    learned = prompt_of(embedder)
    if labels is not None or (learned is not None and learned.classes and not has_head(model)):
        from vlm.runtime.embedder import scores

        if labels is None and learned is not None:
            names = {label: plain_name(label) for label in learned.classes}
        else:
            names = {label: label for label in _labels(labels or "")}
        if template is None and learned is not None:
            texts = embedder.encode_text([learned.text(name, label) for label, name in names.items()])
        else:
            texts = embedder.encode_text([(template or "{}").replace("{}", name) for name in names.values()])
        return list(names), lambda picture: (scores(embedder, embedder.encode_image([picture]), texts), None), embedder.form, None
    classifier: Any = embedder
    if getattr(classifier, "classes", ()):
        if template is not None:
            raise RequestError("--template has no use without --labels: a trained head reads no texts")
        return list(classifier.classes), lambda picture: (classifier.classify([picture]), None), "softmax", "model"
    if not has_head(model):
        raise RequestError(
            "no labels given, and this model has no trained head",
            where=model,
            remedy='name them: --labels "cat,dog"; or train a head: vlm finetune linear-probe --model DIR data.label=FIELD',
        )
    if template is not None:
        raise RequestError("--template has no use without --labels: a trained head reads no texts")
    head = read_head(model)
    return head.classes, lambda picture: (head.scores(embedder, picture), None), "softmax", head.name


def _by_descriptors(
    model: str, labels: str | None, template: str | None, threads: int | None, descriptors: str, reduce: str | None
) -> tuple[list[str], Callable[[Any], tuple[np.ndarray, Why | None]], Form, str | None]:
    """Labels by what can be seen of them: a label's score is made of the cosines of its texts."""
    from vlm.cli.encoders import open_embedder
    from vlm.evaluation.classes import ClassEntry
    from vlm.evaluation.zero_shot import class_scores, explained, prompts_of
    from vlm.runtime.descriptors import read_descriptors
    from vlm.runtime.prompt import class_names, prompt_of

    table = read_descriptors(descriptors)
    names = list(table) if labels is None else _labels(labels)
    embedder = open_embedder(model, threads=threads)
    entries = [ClassEntry(label, (name,)) for label, name in class_names(names).items()]
    templates = None if template is None else (template,)
    texts, owner = prompts_of(entries, templates, learned=prompt_of(embedder), table=table)
    rows = embedder.encode_text(texts)

    def score(picture: Any) -> tuple[np.ndarray, Why]:
        image = embedder.encode_image([picture])
        cosines = class_scores(image, rows, owner, reduce or "score-mean")  # type: ignore[arg-type]
        values = embedder.scale * cosines + embedder.bias
        return values, lambda number: explained(image[0], rows, owner, texts, number)

    return names, score, embedder.form, None


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
