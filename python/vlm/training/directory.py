"""The run directory: what a run leaves behind, and where.

`preset.toml` (resolved), `environment.json`, `architecture/` (config, tokenizer and preprocessing, from the start),
`metrics.jsonl`, `checkpoints/step-N/`, `stages/` (final weights that a later stage names),
`quarantine.jsonl`, `model/` (final, Hugging Face layout), `report.html`.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import vlm
from vlm.config.errors import CheckpointError, RequestError, RunFailed
from vlm.data.tokenizer import Tokenizer
from vlm.models import Model
from vlm.models.directory import model_files, save_model
from vlm.runtime.preprocess import Preprocess
from vlm.training.checkpoint import flush, publish, sha256_of
from vlm.types.tensor_file import save_tensors

Note = Callable[[str], None]


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    root: Path

    @property
    def preset(self) -> Path:
        return self.root / "preset.toml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def architecture(self) -> Path:
        return self.root / "architecture"

    @property
    def model(self) -> Path:
        return self.root / "model"

    def refuse_used(self) -> None:
        """Raises RequestError when the directory already holds something, or is none."""
        if self.root.exists() and not self.root.is_dir():
            raise RequestError("the output directory is a file", where=str(self.root), remedy="choose another --output")
        if self.root.exists() and any(self.root.iterdir()):
            begun = f"continue it with --resume {self.root}, or " if self.preset.is_file() else ""
            raise RequestError("the output directory is not empty", where=str(self.root), remedy=f"{begun}choose another --output")

    def create(self, preset_text: str) -> None:
        """Begin a new run. Raises RequestError when the directory already holds something."""
        self.refuse_used()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.preset.write_text(preset_text, encoding="utf-8")
            (self.root / "environment.json").write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            shutil.rmtree(self.root, ignore_errors=True)  # it was empty: the same command may be given again
            raise RunFailed(f"cannot be written: {error.strerror}", where=str(self.root), remedy="choose another --output") from error

    def write_architecture(self, model: Model, tokenizer: Tokenizer | None, preprocess: Preprocess | None) -> None:
        """Config, tokenizer and preprocessing without weights, so that a resume needs nothing from outside."""
        with _replacing(self.architecture) as folder:
            for name, content in model_files(model):
                (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            write_companions_of(folder, tokenizer, preprocess)

    def write_model(self, model: Model, tensors: dict[str, Any], tokenizer: Tokenizer | None, preprocess: Preprocess | None) -> Path:
        """The final model, published by rename. Returns a temporary-free path."""
        with _replacing(self.model) as folder:
            save_model(model, folder, tensors)
            write_companions_of(folder, tokenizer, preprocess)
        return self.model


    def write_stage(self, index: int, state: dict[str, Tensor]) -> dict[str, str]:
        """Final weights of a stage, under the names of a model without adapters. Returns what `read_stage` takes."""
        folder = self.root / "stages"
        name = f"{index}.safetensors"
        try:
            folder.mkdir(exist_ok=True)
            save_tensors({key: tensor.detach().contiguous().clone() for key, tensor in state.items()}, folder / name)
            flush(folder / name)
        except OSError as error:
            raise RunFailed(f"cannot be written: {error.strerror or error}", where=str(folder / name)) from error
        return self.stage_entry(index)

    def stage_entry(self, index: int) -> dict[str, str]:
        name = f"{index}.safetensors"
        return {"file": name, "sha256": sha256_of(self.root / "stages" / name)}

    def read_stage(self, entry: dict[str, str]) -> dict[str, Tensor]:
        """The weights of an entry. Raises CheckpointError when the file is gone or altered."""
        path = self.root / "stages" / Path(entry["file"]).name
        if not path.is_file() or sha256_of(path) != entry["sha256"]:
            raise CheckpointError("is missing or altered (its hash differs); a companion has these weights", where=str(path))
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot be read: {error}", where=str(path)) from error


def write_companions_of(folder: Path, tokenizer: Tokenizer | None, preprocess: Preprocess | None) -> None:
    """The files that go with the weights."""
    if tokenizer is not None:
        tokenizer.save(folder)
    if preprocess is not None:
        text = json.dumps(preprocess.to_config(), indent=2)
        (folder / "preprocessor_config.json").write_text(text + "\n", encoding="utf-8")


class _replacing:
    """A temporary folder that takes its place when the block ends well, and vanishes otherwise."""

    def __init__(self, final: Path) -> None:
        self.final = final
        self.temporary = final.with_name(f".{final.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            publish(self.temporary, self.final)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


def environment() -> dict[str, Any]:
    """Versions and machine of a run, for its records."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for name in ("torch", "transformers", "numpy", "safetensors", "tokenizers", "onnxruntime-gpu", "pillow"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "vlm": vlm.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
