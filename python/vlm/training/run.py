"""A run from preset to model directory: assembles the parts of each stage and hands them to the trainer."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vlm.config.errors import CheckpointError, RequestError, VlmError
from vlm.config.load import Resolved
from vlm.config.machine import usable_cores
from vlm.config.writing import to_toml
from vlm.data.endless import Loader
from vlm.data.loader import build_loader, open_split
from vlm.data.options import DataOptions
from vlm.data.sources.base import Source
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation import evaluate_in_memory, numbers_of, save_results
from vlm.evaluation.reading import Reading
from vlm.models import Model, load_model
from vlm.objectives import BuildContext
from vlm.runtime.chat import Template
from vlm.runtime.templates import TEMPLATES
from vlm.training.assembly import build_objective, choose_trainable, steps_of
from vlm.training.average import WeightAverage
from vlm.training.carry import Carried
from vlm.training.checkpoint import Checkpoints
from vlm.training.companion_sources import CompanionSources
from vlm.training.directory import Note, RunDirectory
from vlm.training.engine import Engine, Weighted
from vlm.training.memory import keep_freed_memory
from vlm.training.metrics import MetricsLog
from vlm.training.optimizer import NamedOptimizer
from vlm.training.preset import Preset, Stage, load_preset, stages_of
from vlm.training.requests import check_offers
from vlm.training.start import Start, vocabulary_of
from vlm.training.trainer import Cursor, Parts, Trainer
from vlm.tuning import add_lora, lora_files, merged_state
from vlm.types import Communicator, SingleProcess
from vlm.types.random import draw_key
from vlm.types.state import Tree

__all__ = ["Run", "RunResult", "vocabulary_of"]


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


class Run:
    """One run in its directory. `begin` makes a new one, `resume` continues one; `train` takes either to its end."""

    def __init__(
        self,
        directory: RunDirectory,
        preset: Preset,
        resolved: Resolved,
        *,
        communicator: Communicator | None = None,
        note: Note = print,
        progress: bool = False,
    ) -> None:
        self.directory = directory
        self.preset = preset
        self.stages = stages_of(resolved)
        self.communicator = communicator or SingleProcess()
        self.note = note if self.communicator.rank == 0 else _silent
        self.progress = progress and self.communicator.rank == 0
        self.tokenizer: Tokenizer | None = None
        self.fresh = False
        if preset.loop is not None:
            raise RequestError("[loop] is not run yet: rounds come with the methods that need them")

    @classmethod
    def begin(cls, output: Path, preset: Preset, resolved: Resolved, **settings: Any) -> Run:
        """A new run. Raises RequestError when the directory is not empty."""
        run = cls(RunDirectory(output), preset, resolved, **settings)
        if run.communicator.rank == 0:
            run.directory.create(to_toml(resolved.values, resolved.origins))
        run.fresh = True
        run.communicator.barrier()
        return run

    @classmethod
    def resume(cls, output: Path, **settings: Any) -> Run:
        """Continue from the newest checkpoint that holds, or from the start when there is none yet."""
        directory = RunDirectory(output)
        if not directory.preset.is_file():
            raise CheckpointError("not a run: preset.toml is missing", where=str(output), remedy="give the directory that --output named")
        preset, resolved = load_preset(str(directory.preset))
        return cls(directory, preset, resolved, **settings)

    def train(self, *, strict: bool = False) -> RunResult:
        """Run every stage that is left, write the model, evaluate it."""
        started = time.monotonic()
        keep_freed_memory()
        threads = self.stages[0].scale.threads
        torch.set_num_threads(threads or max(1, usable_cores() // self.communicator.size))
        checkpoints = Checkpoints(self.directory.checkpoints, keep=self.stages[0].train.keep)
        found = checkpoints.newest(self.note, strict=strict)
        tree: Tree | None = None
        cursor, carried = Cursor(), Carried()
        if found is not None:
            tree = found[1]
            cursor.load_state_dict(tree["cursor"])
            carried.load_state_dict(tree.get("carried", {}))
            self.note(f"continuing from {checkpoints.path(found[0])}")
        root = self.directory if self.communicator.rank == 0 else None
        board = self.directory.root / "tensorboard" if self.stages[0].train.tensorboard else None
        metrics = MetricsLog(root.metrics if root else None, tensorboard=board)
        if tree is None:
            metrics.rewind(0)
        previous: dict[str, torch.Tensor] | None = None
        parts: Parts | None = None
        while not cursor.done:
            stage = self.stages[cursor.stage]
            try:
                parts = self.assemble(stage, cursor, initial=tree is None, weights=previous, carried=carried)
            except VlmError:
                metrics.close()
                self._abandon(cursor)
                raise
            trainer = Trainer(
                parts,
                cursor,
                checkpoints,
                metrics,
                self.communicator,
                evaluate=self._evaluate_inside if stage.evaluation.tasks else None,
                note=self.note,
                progress=self.progress,
            )
            try:
                if tree is not None:
                    trainer.load_state_dict(tree)
                    tree = None
                else:
                    carried.give(parts.objectives, parts.companions, parts.optimizer)
                trainer.run()
                previous = self._final_state(parts)
                if cursor.stage + 1 == len(self.stages):
                    cursor.done = True
                    trainer.save()
                else:
                    carried.take(parts.objectives, parts.companions, parts.optimizer)
                    self._keep_stage(cursor.stage, previous, carried)
                    cursor.stage, cursor.step = cursor.stage + 1, 0
            except BaseException as error:
                metrics.close()
                if isinstance(error, RequestError):
                    self._abandon(cursor)
                raise
            finally:
                parts.loader.close()
        if parts is None:  # resumed after the last update
            parts = self.assemble(self.stages[-1], cursor, initial=False, carried=carried)
            with contextlib.closing(parts.loader):
                if tree is not None:
                    trainer = Trainer(parts, cursor, checkpoints, metrics, self.communicator, note=self.note)
                    trainer.load_state_dict(tree)
            previous = self._final_state(parts)
        assert previous is not None
        return self._finish(parts, previous, cursor, metrics, started)

    def _abandon(self, cursor: Cursor) -> None:
        """Take a new run's directory away again when nothing was trained: the same command may be given again, mended."""
        if self.fresh and cursor.total == 0 and self.communicator.rank == 0:
            shutil.rmtree(self.directory.root)

    def assemble(
        self,
        stage: Stage,
        cursor: Cursor,
        *,
        initial: bool,
        weights: dict[str, torch.Tensor] | None = None,
        carried: Carried | None = None,
        rehearse: bool = False,
    ) -> Parts:
        """Everything a stage trains with. initial: fresh or published weights are wanted, not a checkpoint's.

        weights, carried: what the stages before left. rehearse: they have not been run (a dry run), and fresh weights
        stand for what they would leave.
        """
        carried = carried if carried is not None else Carried()
        model = self.model_of(stage, initial=initial and weights is None)
        if weights is not None:
            model.load_state_dict(weights)
        tuning, seed = stage.tuning, stage.train.seed
        if tuning.lora is not None:
            torch.manual_seed(draw_key(seed, "lora", cursor.stage))
            add_lora(model, tuning.lora)
        choose_trainable(model, tuning)
        model.set_recompute(stage.train.recompute)
        source = open_split(stage.data, "train")
        address = ", ".join(stage.data.mixture) or stage.data.source
        self.note(f"data: {address} is {source.kind}, {len(source)} samples")
        loader = self._loader(stage, model, source)
        try:
            sources = CompanionSources(
                stage.companions,
                model,
                self.directory.root / "cache",
                carried.companions,
                lambda name: self._stage_model(name, cursor.stage, carried, rehearse=rehearse),
            )
            torch.manual_seed(draw_key(seed, "objectives", cursor.stage))
            context = BuildContext(model, sources, loader.classes().get(stage.data.label or "", ()))
            objectives = nn.ModuleDict({options.name: build_objective(options, context) for options in stage.objectives})
            weighted = [Weighted(o.name, objectives[o.name], o.weight) for o in stage.objectives]  # type: ignore[arg-type]
            asked = {entry.name: entry.objective.requires for entry in weighted}
            companions = sources.companions(asked, self.note)
            check_offers(asked, {**companions.models(), "model": model})
            engine = Engine(model, weighted, companions, self.communicator, seed=seed, precision=stage.train.precision)
            named = {name: p for name, p in model.named_parameters() if p.requires_grad}
            named |= {f"objectives.{name}": p for name, p in objectives.named_parameters() if p.requires_grad}
            if not named:
                raise RequestError("nothing is trainable in this stage", remedy="check tuning.train and tuning.freeze")
            samples = None if stage.data.packer is not None else len(source)
            return Parts(
                stage=stage,
                model=model,
                engine=engine,
                optimizer=NamedOptimizer(stage.optimizer, named, tuning.rates),
                companions=companions,
                loader=loader,
                objectives=objectives,
                average=WeightAverage(model, stage.train.average) if stage.train.average else None,
                steps=steps_of(stage, samples),
                samples=samples,
                carried=carried,
            )
        except BaseException:
            loader.close()
            raise

    def model_of(self, stage: Stage, *, initial: bool) -> Model:
        """The architecture of a stage; with `initial` also its first weights."""
        start = Start(self.directory, self.communicator, self.note)
        self.tokenizer = self.tokenizer or start.tokenizer(stage)
        return start.model(stage, self.tokenizer, initial=initial)

    def _keep_stage(self, index: int, state: dict[str, torch.Tensor], carried: Carried) -> None:
        """Write the final weights of a stage where a companion of a later one has them."""
        name = self.stages[index].name
        if any(table.stage == name for later in self.stages[index + 1 :] for table in later.companions.values()):
            if self.communicator.rank == 0:
                self.directory.write_stage(index, state)
            self.communicator.barrier()
            carried.stages[name] = self.directory.stage_entry(index)

    def _stage_model(self, name: str, now: int, carried: Carried, *, rehearse: bool) -> Model:
        """The model with the final weights of an earlier stage. Raises RequestError when it is not earlier."""
        earlier = [stage.name for stage in self.stages[:now]]
        if name not in earlier:
            raise RequestError(
                f"stage {name!r} has not been run when stage {self.stages[now].name!r} begins",
                remedy=f"stages before it: {', '.join(earlier) or 'none'}",
            )
        model = load_model(self.directory.architecture, weights=False)
        if not rehearse:
            model.load_state_dict(self.directory.read_stage(carried.stages[name]))
        return model

    def _loader(self, stage: Stage, model: Model, source: Source) -> Loader:
        """The training data as this model reads them; texts are cut at the model's own length."""
        data, length = stage.data, model.options.text_length  # type: ignore[attr-defined]
        if length is not None and data.packer is None and "length" not in data.text.model_fields_set:
            data = data.model_copy(update={"text": data.text.model_copy(update={"length": length})})
        asked = data.packer.length if data.packer is not None else data.text.length
        if length is not None and asked > length:
            raise RequestError(f"texts of {asked} tokens for a model of {length}", remedy="shorten data.text.length or data.packer.length")
        return build_loader(
            data,
            tokenizer=self.tokenizer,
            preprocess=model.preprocesses() or None,
            batch_size=stage.train.batch_size,
            seed=stage.train.seed,
            communicator=self.communicator,
            source=source,
            picture_positions=model.training_positions,
            tiling=model.tiling,
            tiles_apart=model.tiles_apart,
            frames=model.frames,
            template=_template_of(model, data),
            quarantine=self.directory.root if self.communicator.rank == 0 else None,
        )

    def _final_state(self, parts: Parts) -> dict[str, torch.Tensor]:
        """Weights that a stage hands on: averaged if there is an average, adapters merged."""
        if parts.average is None:
            return {name: t.detach().clone() for name, t in merged_state(parts.model).items()}
        with parts.average.applied(parts.model):
            return {name: t.detach().clone() for name, t in merged_state(parts.model).items()}

    def _evaluation_settings(self, stage: Stage) -> dict[str, Any]:
        """Evaluation reads with the columns, caps and budget of the run's own data; tasks the data cannot serve are said."""
        data = stage.data
        return {
            "reading": Reading.of(data.columns, data.limits),
            "bad_budget": data.bad_samples.budget,
            "skip": self.note,
        }

    def _evaluate_inside(self, parts: Parts) -> dict[str, float]:
        """Evaluation during training, on rank 0; the others wait."""
        values: dict[str, float] = {}
        if self.communicator.rank == 0:
            parts.model.eval()
            tasks = parts.stage.evaluation.tasks
            settings = self._evaluation_settings(parts.stage)
            values = numbers_of(evaluate_in_memory(parts.model, self.tokenizer, tasks, parts.stage.data.val, **settings))
            parts.model.train()
        self.communicator.barrier()
        return values

    def _finish(
        self, parts: Parts, state: dict[str, torch.Tensor], cursor: Cursor, metrics: MetricsLog, started: float
    ) -> RunResult:
        """Write model/, evaluate it, log the figures."""
        clean = load_model(self.directory.architecture, weights=False)
        clean.load_state_dict(state)
        clean.eval()
        result = RunResult(self.directory.root, cursor.total, 0.0, sum(p.numel() for p in clean.parameters()))
        if self.communicator.rank == 0:
            self.directory.write_model(clean, dict(clean.state_dict()), self.tokenizer, clean.preprocess())
            if parts.stage.tuning.lora is not None:
                lora_files(parts.model, parts.stage.tuning.lora, self.directory.root / "adapter")
            self._write_heads(parts)
            self.note(f"model written to {self.directory.model}")
            if parts.stage.evaluation.tasks:
                settings = parts.stage.evaluation
                self.note("evaluating")
                results = evaluate_in_memory(
                    clean,
                    self.tokenizer,
                    settings.tasks,
                    parts.stage.data.val,
                    examples=settings.examples,
                    **self._evaluation_settings(parts.stage),
                )
                save_results(results, self.directory.root)
                metrics.write(cursor.total, numbers_of(results))
                result.evaluations = [one.as_json(examples=False) for one in results]
        metrics.close()
        self.communicator.barrier()
        result.seconds = time.monotonic() - started
        return result

    def _write_heads(self, parts: Parts) -> None:
        """Parameters that objectives own (classification heads, bridges), beside the model."""
        tensors = {name: t.detach().contiguous() for name, t in parts.objectives.state_dict().items()}
        if tensors:
            classes = {name: getattr(o, "classes", None) for name, o in parts.objectives.items()}
            metadata = {name: json.dumps(list(values)) for name, values in classes.items() if values}
            save_file(tensors, self.directory.root / "objectives.safetensors", metadata=metadata)


def _template_of(model: Model, data: DataOptions) -> Template | None:
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


def _silent(text: str) -> None:
    return None
