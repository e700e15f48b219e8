"""The training data of a stage, as its model reads them."""

from __future__ import annotations

import json
from pathlib import Path

from vlm.config.errors import RequestError
from vlm.data.endless import Loader
from vlm.data.loader import build_loader
from vlm.data.options import DataOptions
from vlm.data.sources.base import Source
from vlm.data.tokenizer import Tokenizer
from vlm.models import Model
from vlm.runtime.chat import Template
from vlm.runtime.templates import TEMPLATES
from vlm.training.preset import Stage
from vlm.types import Communicator


def loader_of(
    stage: Stage,
    model: Model,
    source: Source,
    *,
    tokenizer: Tokenizer | None,
    communicator: Communicator,
    quarantine: Path,
) -> Loader:
    """The training data as this model reads them; texts are cut at the model's own length.

    quarantine: the directory of the list of bad samples. Raises RequestError for texts longer than the model reads, and
    for messages that are written otherwise than it will be asked.
    """
    data, length = stage.data, model.options.text_length  # type: ignore[attr-defined]
    if length is not None and data.packer is None and "length" not in data.text.model_fields_set:
        data = data.model_copy(update={"text": data.text.model_copy(update={"length": length})})
    asked = data.packer.length if data.packer is not None else data.text.length
    if length is not None and asked > length:
        raise RequestError(f"texts of {asked} tokens for a model of {length}", remedy="shorten data.text.length or data.packer.length")
    return build_loader(
        data,
        tokenizer=tokenizer,
        preprocess=model.preprocesses() or None,
        batch_size=stage.train.batch_size,
        seed=stage.train.seed,
        communicator=communicator,
        source=source,
        picture_positions=model.training_positions,
        tiling=model.tiling,
        tiles_apart=model.tiles_apart,
        frames=model.frames,
        triples=model.triples,
        template=template_of(model, data),
        prompt=model.prompt,
        quarantine=quarantine if communicator.rank == 0 else None,
    )


def template_of(model: Model, data: DataOptions) -> Template | None:
    """How the model's messages are written, which is also how it will be asked. Raises RequestError for data that differ."""
    name = getattr(model.options, "template", None)
    if name is None:
        return None
    if data.text.template not in (None, name):
        raise RequestError(
            f"data.text.template is {data.text.template!r} for a model of template {name!r}",
            remedy=f"set model.template = {json.dumps(data.text.template)}, or leave data.text.template out",
        )
    return TEMPLATES[name]
