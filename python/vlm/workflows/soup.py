"""Weights of several models of one architecture as one: soups, and interpolation with the model that was finetuned.

Sources: weight-average (uniform soup), and WiSE-FT (two models, one the start of the other).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vlm.config.errors import CheckpointError, RequestError, RunFailed
from vlm.data.tokenizer import Tokenizer
from vlm.models import load_model
from vlm.models.directory import find_model_directory, save_model
from vlm.training.checkpoint import publish
from vlm.training.directory import write_companions_of


def soup(models: Sequence[str | Path], output: Path, weights: Sequence[float] | None = None) -> dict[str, Any]:
    """Write sum_i w_i model_i to `output`, a model directory. Returns what was done, as JSON.

    models: runs or model directories of one architecture and one tokenizer. weights: one a model, of sum 1, also below 0 and above 1
    (extrapolation); none: all alike. Sums are float64, tensors float32. Raises RequestError for weights or an output that do not
    fit, CheckpointError naming the model that is of another shape.
    """
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(models) < 2 or len(shares) != len(models):
        raise RequestError(f"{len(models)} models and {len(shares)} weights", remedy="give two models or more, and a weight for each")
    if not abs(sum(shares) - 1) <= 1e-6:  # NaN too
        raise RequestError(f"the weights sum to {sum(shares):g}, expected 1", where="--weights")
    if output.exists():
        raise RequestError("something is there already", where=str(output), remedy="choose another --output")
    folders = [find_model_directory(path) for path in models]
    first = load_model(folders[0])
    total = {name: shares[0] * tensor.double() for name, tensor in first.state_dict().items()}
    told = _tokenizer_of(folders[0])
    for share, folder in zip(shares[1:], folders[1:]):
        other = load_model(folder)
        state = other.state_dict()
        if type(other) is not type(first) or other.vocabulary != first.vocabulary or _tokenizer_of(folder) != told:
            remedy = f"expected one like {folders[0]}"
            raise CheckpointError("is of another kind, or has another tokenizer", where=str(folder), remedy=remedy)
        odd = _first_difference(total, state)
        if odd is not None or other.options != first.options:
            what = f"tensor {odd!r} differs from" if odd else "has other settings than"
            raise CheckpointError(f"{what} {folders[0]}", where=str(folder), remedy="a soup is of models of one architecture")
        for name, tensor in state.items():
            total[name] += share * tensor.double()
    made = {name: tensor.to(torch.float32) for name, tensor in total.items()}
    _write(first, made, folders[0], output)
    return {
        "schema": 1,
        "output": str(output),
        "models": [{"path": str(path), "weight": share} for path, share in zip(models, shares)],
        "parameters": sum(tensor.numel() for tensor in made.values()),
    }


def _first_difference(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> str | None:
    """The first tensor that is not in both with one shape."""
    names = [*one, *(name for name in other if name not in one)]
    return next((n for n in names if n not in one or n not in other or one[n].shape != other[n].shape), None)


def _tokenizer_of(folder: Path) -> bytes | None:
    path = folder / "tokenizer.json"
    return path.read_bytes() if path.is_file() else None


def _write(model: Any, tensors: dict[str, torch.Tensor], like: Path, output: Path) -> None:
    """The directory, complete or not at all."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_model(model, partial, tensors)
        write_companions_of(partial, Tokenizer.load(like) if (like / "tokenizer.json").is_file() else None, model.preprocess())
        if (like / "chat_template.jinja").is_file():
            shutil.copyfile(like / "chat_template.jinja", partial / "chat_template.jinja")
        publish(partial, output)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"cannot be written: {error.strerror or error}", where=str(output)) from error
