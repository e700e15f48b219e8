"""Model directories: a Hugging Face layout on disk, read and written.

`config.json` and `model.safetensors` are in a published layout wherever it can say the model; `vlm.json` beside
them holds our exact options. Weights are safetensors only: pickle is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlm.config.errors import CheckpointError, RequestError
from vlm.config.load import merge_tables
from vlm.config.options import Options
from vlm.config.resolved import Resolved
from vlm.config.tree import Node
from vlm.config.validation import validate
from vlm.models.base import Model
from vlm.models.catalogue import ModelOptions
from vlm.models.layouts import LAYOUTS, PublishedLayout
from vlm.runtime.preprocess import Preprocess
from vlm.types import VocabularyLayout
from vlm.types.tensor_file import save_tensors
from vlm.types.vocabulary import Span

SCHEMA = 1
MAX_JSON = 16 * 2**20
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _Whole(Options):
    """A preset of which only the model is looked at."""

    model: ModelOptions


_OPTIONS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ModelOptions)


def find_model_directory(path: str | Path) -> Path:
    """The model directory itself, or `model/` inside a run. Raises CheckpointError when there is neither."""
    path = Path(path)
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file() or (candidate / "vlm.json").is_file():
            return candidate
    if not path.exists():
        raise CheckpointError(
            "no such model directory", where=str(path), remedy="give a run, a model directory in Hugging Face layout or a bundle"
        )
    raise CheckpointError(
        "not a model directory: config.json is missing",
        where=str(path),
        remedy="expected a run directory with model/, or config.json beside model.safetensors",
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises CheckpointError naming the file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise CheckpointError(f"larger than {MAX_JSON} bytes", where=str(path))
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", where=str(path)) from error
    if not isinstance(value, dict):
        raise CheckpointError("expected a JSON object", where=str(path))
    return value


def load_model(path: str | Path, *, weights: bool = True, changes: Mapping[str, Any] | None = None) -> Model:
    """The model of a run, of a directory we wrote, or of a published directory (CLIP, SigLIP, Llama, Qwen2, LLaVA).

    weights = False gives the architecture with fresh weights. changes: settings laid over the model's own by the rules of a
    stage, such as `attention`: they change how it is asked, and its weights must still fit. Raises CheckpointError naming
    the file and, for tensors, the first missing or misshapen name; RequestError for changes that make no model.
    """
    directory = find_model_directory(path)
    own = directory / "vlm.json"
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    layout = LAYOUTS.get(str(config.get("model_type")))
    if own.is_file():
        options, vocabulary = _own_description(own)
    else:
        if layout is None:
            raise CheckpointError(
                f"model_type {config.get('model_type')!r} is not supported",
                where=str(directory / "config.json"),
                remedy=f"known layouts: {', '.join(LAYOUTS)}",
            )
        try:
            options = layout.from_config(config)
            if hasattr(options, "with_preprocess"):
                for where, given in _published_pictures(directory):
                    options = options.with_preprocess(Preprocess.from_config(given, where=where))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"cannot honour this config: {error}", where=str(directory / "config.json")) from error
        vocabulary = _published_vocabulary(config)
    if changes:
        options = _changed(options, changes)
    try:
        model: Model = options.build(vocabulary)
    except ValueError as error:  # settings that fit one by one, but not together
        if changes:
            raise RequestError(f"makes no model: {error}") from error
        raise CheckpointError(f"makes no model: {error}", where=str(own if own.is_file() else directory / "config.json")) from error
    if weights:
        tensors = read_weights(directory)
        if layout is not None:
            tensors = layout.from_published(tensors, options)
        fill(model, tensors, where=str(directory))
    return model


def _changed(options: Any, changes: Mapping[str, Any]) -> Any:
    """The options with settings laid over them. Raises RequestError that names the first one that cannot be."""
    values = merge_tables(options.model_dump(), changes)
    return validate(Resolved(Node({})).derive({"model": values}), _Whole).model


def _own_description(path: Path) -> tuple[Any, VocabularyLayout]:
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise CheckpointError(
            f"schema {data.get('schema')!r}, expected {SCHEMA}", where=str(path), remedy="use the vlm release that wrote it, or newer"
        )
    try:
        options = _OPTIONS.validate_python(data["options"])
        spans = {name: Span(*span) for name, span in data["vocabulary"]["spans"].items()}
        return options, VocabularyLayout(spans, data["vocabulary"]["special"])
    except (pydantic.ValidationError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"does not describe a model: {error}", where=str(path)) from error


def _published_pictures(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, settings) of the preprocessing of a published directory: a file of its own, or a part of the processor's."""
    own, processor = directory / "preprocessor_config.json", directory / "processor_config.json"
    if own.is_file():
        yield str(own), read_json(own)
    elif processor.is_file():
        given = read_json(processor).get("image_processor")
        if isinstance(given, dict):
            yield str(processor), given


def _published_vocabulary(config: dict[str, Any]) -> VocabularyLayout:
    text = config.get("text_config") or config
    size = int(text.get("vocab_size", 49408))
    special = {name: text.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    special["image"] = config.get("image_token_index", config.get("image_token_id"))
    kept = {name: token for name, token in special.items() if isinstance(token, int) and 0 <= token < size}
    return VocabularyLayout.of_text(size, kept)


def read_weights(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory: `model.safetensors`, or the shards that its index names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        named = read_json(index).get("weight_map")
        if not isinstance(named, dict) or not named or not all(isinstance(name, str) and name for name in named.values()):
            raise CheckpointError("weight_map is missing, empty, or names no files", where=str(index))
        names = sorted(set(named.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError("names a shard outside the directory", where=str(index))
        files = [directory / name for name in names]
    else:
        pickles = [p.name for p in directory.iterdir() if p.suffix in PICKLES]
        if pickles:
            raise CheckpointError(
                f"{pickles[0]} is a pickle, which can run code and is refused",
                where=str(directory),
                remedy="convert it to model.safetensors in an environment you trust (transformers: save_pretrained)",
            )
        raise CheckpointError("model.safetensors is missing", where=str(directory))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read as safetensors: {error}", where=str(file)) from error
    return tensors


def fill(model: Model, tensors: dict[str, Tensor], *, where: str) -> None:
    """Copy tensors into a model. Raises CheckpointError for a missing or misshapen one; unknown ones are refused too."""
    state = model.state_dict()
    missing = [name for name in state if name not in tensors]
    if missing:
        raise CheckpointError(f"tensor {missing[0]!r} is missing ({len(missing)} in all)", where=where)
    heads = [name for name in tensors if name not in state and (name == "head.weight" or name.endswith("lm_head.weight"))]
    unknown = [name for name in tensors if name not in state and name not in heads]
    _check_tied(heads, tensors, where)
    if unknown:
        raise CheckpointError(f"tensor {unknown[0]!r} is not part of this model ({len(unknown)} such)", where=where)
    for name, tensor in state.items():
        if tensors[name].shape != tensor.shape:
            raise CheckpointError(
                f"tensor {name!r} is {tuple(tensors[name].shape)}, expected {tuple(tensor.shape)}", where=where
            )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])


def _check_tied(heads: list[str], tensors: dict[str, Tensor], where: str) -> None:
    """A head that the model does not have must be its embedding once more. Raises CheckpointError."""
    rows = [tensor for name, tensor in tensors.items() if name.endswith("tokens.weight")]
    for name in heads:
        if rows and not any(torch.equal(tensors[name], tensor) for tensor in rows):
            raise CheckpointError(
                f"tensor {name!r} differs from the embedding that config.json ties it to", where=where,
                remedy="set tie_word_embeddings = false in config.json if the head was trained apart",
            )  # fmt: skip


def published_layout(model: Model) -> PublishedLayout | None:
    """The layout in which `transformers` can load this model, or None."""
    return next((layout for layout in LAYOUTS.values() if layout.expresses(model.options)), None)


def model_files(model: Model) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, JSON content) of the files that describe a model."""
    layout = published_layout(model)
    options: Any = model.options
    if layout is not None:
        yield "config.json", layout.to_config(options, model.vocabulary)
        processor = layout.processor_config(options)
        if processor:
            yield "processor_config.json", processor
    else:
        yield "config.json", {"model_type": f"vlm-{model.kind}", "architectures": [type(model).__name__]}
    yield (
        "vlm.json",
        {
            "schema": SCHEMA,
            "options": options.model_dump(mode="json"),
            "vocabulary": {
                "spans": {name: [span.start, span.stop] for name, span in model.vocabulary.spans.items()},
                "special": model.vocabulary.special,
            },
        },
    )


def save_model(
    model: Model, directory: str | Path, tensors: dict[str, Tensor] | None = None, *, template: str | None = None
) -> None:
    """Write config.json, vlm.json and model.safetensors (float32). `tensors` replaces the model's own state (an
    average of weights, merged adapters). template: the text of chat_template.jinja (`vlm.runtime.chat_jinja`).
    The caller publishes the directory by renaming it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in model_files(model):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    state = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in (tensors or model.state_dict()).items()}
    layout = published_layout(model)
    if layout is not None:
        state = layout.to_published(dict(state), model.options)
    save_tensors({name: t.contiguous() for name, t in state.items()}, directory / "model.safetensors", metadata={"format": "pt"})
