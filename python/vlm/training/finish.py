"""The end of a run: the weights that a stage hands on, the model directory, its evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlm.data.tokenizer import Tokenizer
from vlm.evaluation import evaluate_in_memory, numbers_of, save_results
from vlm.evaluation.reading import Reading
from vlm.models import load_model
from vlm.training.directory import Note, RunDirectory
from vlm.training.metrics import MetricsLog
from vlm.training.preset import Stage
from vlm.training.trainer import Parts
from vlm.tuning import lora_files, merged_state
from vlm.types import Communicator
from vlm.types.tensor_file import save_tensors


@dataclass
class RunResult:
    """What a finished run says."""

    output: Path
    steps: int
    seconds: float
    parameters: int
    evaluations: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "model": str(self.output / "model"),
            "steps": self.steps,
            "seconds": round(self.seconds, 1),
            "parameters": self.parameters,
            "evaluations": self.evaluations,
        }


def final_state(parts: Parts) -> dict[str, torch.Tensor]:
    """Weights that a stage hands on: averaged if there is an average, adapters merged."""
    if parts.average is None:
        return {name: t.detach().clone() for name, t in merged_state(parts.model).items()}
    with parts.average.applied(parts.model):
        return {name: t.detach().clone() for name, t in merged_state(parts.model).items()}


def evaluation_settings(stage: Stage, note: Note) -> dict[str, Any]:
    """Evaluation reads with the columns, caps and budget of the run's own data; tasks the data cannot serve are said."""
    bad = stage.data.bad_samples
    return {
        "reading": Reading.of(stage.data),
        "bad_budget": 0.0 if bad.policy == "stop" else bad.budget,
        "skip": note,
    }


def finish(
    directory: RunDirectory,
    parts: Parts,
    state: dict[str, torch.Tensor],
    steps: int,
    metrics: MetricsLog,
    tokenizer: Tokenizer | None,
    communicator: Communicator,
    note: Note,
) -> RunResult:
    """Write model/ with the weights of `state`, evaluate it, log the figures after `steps` updates."""
    clean = load_model(directory.architecture, weights=False)
    clean.load_state_dict(state)
    clean.eval()
    result = RunResult(directory.root, steps, 0.0, sum(p.numel() for p in clean.parameters()))
    if communicator.rank == 0:
        directory.write_model(clean, dict(clean.state_dict()), tokenizer, clean.preprocess())
        if parts.stage.tuning.lora is not None:
            lora_files(parts.model, parts.stage.tuning.lora, directory.root / "adapter")
        _write_heads(parts, directory.root)
        note(f"model written to {directory.model}")
        if parts.stage.evaluation.tasks:
            settings = parts.stage.evaluation
            note("evaluating")
            results = evaluate_in_memory(
                clean,
                tokenizer,
                settings.tasks,
                parts.stage.data.val,
                examples=settings.examples,
                **evaluation_settings(parts.stage, note),
            )
            save_results(results, directory.root)
            metrics.write(steps, numbers_of(results))
            result.evaluations = [one.as_json(examples=False) for one in results]
    metrics.close()
    communicator.barrier()
    return result


def _write_heads(parts: Parts, root: Path) -> None:
    """Parameters that objectives own (classification heads, bridges), beside the model."""
    tensors = {name: t.detach().contiguous() for name, t in parts.objectives.state_dict().items()}
    if tensors:
        classes = {name: getattr(o, "classes", None) for name, o in parts.objectives.items()}
        metadata = {name: json.dumps(list(values)) for name, values in classes.items() if values}
        save_tensors(tensors, root / "objectives.safetensors", metadata=metadata)
