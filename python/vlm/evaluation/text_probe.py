"""Linear probe on frozen embeddings of texts: `linear_probe` on what a language model makes of a text. Source: budget-longformer.

n samples, E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field, model_validator

from vlm.config.errors import DataError
from vlm.data.samples import field_at
from vlm.evaluation.linear_probe import LinearProbeOptions, linear_probe
from vlm.evaluation.material import BadTally, Fingerprint, Floats, Item, Material
from vlm.evaluation.result import Result
from vlm.evaluation.task import Fields, Needs, Task


class TextEncoder(Protocol):
    """What the task needs of a language model."""

    name: str

    def encode_text(self, texts: Sequence[str]) -> Floats:
        """[n, E] float32 unit rows."""
        ...


class TextProbeOptions(Task):
    """A linear classifier on frozen embeddings of texts."""

    task: Literal["text-probe"] = "text-probe"
    field: str = Field("auto", description="data field with the text; auto: the text column")
    labels_from: Fields | None = Field(None, description="data field that holds a sample's class, or several: the first one that the data has")
    train: str | None = Field(None, description="data to fit on; default: folds of the evaluated data by concept")
    folds: int = Field(5, ge=2, description="folds by concept where no training data is given")
    penalties: tuple[float, ...] = Field(tuple(10.0**e for e in range(-4, 2)), min_length=1, description="tried strengths of 1/2 |W|^2 per sample")
    needs: ClassVar[Needs] = "tokens"

    @model_validator(mode="after")
    def _folds(self) -> TextProbeOptions:
        self.read_only_where(self.train is None, "the evaluated data are fitted on (no train)", "folds")
        return self

    def probe(self) -> LinearProbeOptions:
        """The options of the classifier itself."""
        shared = {name: getattr(self, name) for name in LinearProbeOptions.model_fields.keys() & type(self).model_fields.keys() - {"task"}}
        return LinearProbeOptions(**shared)


def text_probe(model: TextEncoder, items: Iterable[Item], train: Iterable[Item] | None, options: TextProbeOptions,
               bad: BadTally | None = None) -> Result:
    """top1 in percent, as of `linear_probe`. Raises DataError when no text or no label is left."""
    material = _material(model, items, options.field, options.limit, bad if bad is not None else BadTally())
    fitted = None if train is None else _material(model, train, options.field, None, BadTally())
    result = linear_probe(material, fitted, options.probe())
    return replace(result, task="text-probe", name=options.title, data={"sha256": material.fingerprint}, bad=material.bad.as_json())


def _material(model: TextEncoder, items: Iterable[Item], field: str, limit: int | None, bad: BadTally) -> Material:
    keys: list[str] = []
    texts: list[str] = []
    fields: list[Mapping[str, Any]] = []
    fingerprint = Fingerprint()
    for item in items:
        if limit is not None and len(keys) >= limit:
            break
        text = next(iter(item.texts), None) if field == "auto" else field_at(dict(item.fields), field)
        if item.problem is not None or not isinstance(text, str) or not text.strip():
            bad.add(item.key, item.problem or "missing_text: the sample has no text")
            continue
        bad.good += 1
        keys.append(item.key)
        texts.append(text)
        fields.append(item.fields)
        fingerprint.add(Item(item.key, (text,), {}, None), None)
    bad.check()
    if not keys:
        raise DataError("the data holds no text", remedy="see what it holds with: vlm data inspect URI")
    rows = np.concatenate([model.encode_text(texts[start : start + 64]) for start in range(0, len(texts), 64)])
    return Material(model, keys, [(text,) for text in texts], fields, rows, fingerprint.hexdigest(), bad)  # type: ignore[arg-type]
