"""A run from preset to model directory: assembles the parts of each stage and hands them to the trainer."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlm.config.errors import CheckpointError, RequestError, VlmError
from vlm.config.load import Resolved
from vlm.config.machine import usable_cores
from vlm.config.writing import to_toml
from vlm.data.endless import Loader
from vlm.data.loader import open_split
from vlm.data.options import DataOptions
from vlm.data.sources.base import Source
from vlm.data.tokenizer import Tokenizer
from vlm.evaluation import check_tasks, evaluate_in_memory, numbers_of
from vlm.evaluation.reading import Reading
from vlm.models import Model, load_model
from vlm.objectives import BuildContext
from vlm.ops import keep_freed_memory
from vlm.training.assembly import build_objective, check_rates, choose_trainable, freeze_objectives, steps_of
from vlm.training.average import WeightAverage
from vlm.training.carry import Carried
from vlm.training.checkpoint import Checkpoints
from vlm.training.companion_sources import CompanionSources, check_sources
from vlm.training.directory import Note, RunDirectory
from vlm.training.engine import Engine, Weighted
from vlm.training.finish import RunResult, evaluation_settings, final_state, finish
from vlm.training.lock import locked_run
from vlm.training.metrics import MetricsLog
from vlm.training.optimizer import NamedOptimizer
from vlm.training.preset import Preset, Stage, load_preset, stages_of
from vlm.training.reading import loader_of
from vlm.training.requests import check_caches, check_offers
from vlm.training.start import Start, vocabulary_of
from vlm.training.trainer import Cursor, Parts, Trainer
from vlm.tuning import add_lora
from vlm.types import Communicator, SingleProcess
from vlm.types.random import draw_key
from vlm.types.state import Tree

__all__ = ["Run", "RunResult", "vocabulary_of"]


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
        """Run every stage that is left, write the model, evaluate it. Raises RequestError while another process trains this run."""
        alone = locked_run(self.directory.root) if self.communicator.rank == 0 else contextlib.nullcontext()
        with alone:
            return self._train(strict)

    def _train(self, strict: bool) -> RunResult:
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
                previous = final_state(parts)
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
            previous = final_state(parts)
        assert previous is not None
        result = finish(
            self.directory, parts, previous, cursor.total, metrics, self.tokenizer, self.communicator, self.note
        )
        result.seconds = time.monotonic() - started
        return result

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
        if initial and cursor.total == 0:
            for later in self.stages[cursor.stage :]:
                check_sources(later.companions)
        model = self.model_of(stage, initial=initial and weights is None)
        if weights is not None:
            model.load_state_dict(weights)
        tuning, seed = stage.tuning, stage.train.seed
        if tuning.lora is not None:
            torch.manual_seed(draw_key(seed, "lora", cursor.stage))
            add_lora(model, tuning.lora)
        if initial and cursor.total == 0:  # what was begun goes on, whatever became of the evaluation data
            self._check_evaluations(model, cursor.stage)
        choose_trainable(model, tuning)
        model.set_recompute(stage.train.recompute)
        source = open_split(stage.data, "train", seed)
        address = ", ".join(stage.data.mixture) or stage.data.source
        self.note(f"data: {address} is {source.kind}, {len(source)} samples")
        loader = self._loader(stage, model, source)
        try:
            sources = CompanionSources(
                stage.companions,
                model,
                self.directory.root / "cache" / _prepared(stage.data, model),
                carried.companions,
                lambda name: self._stage_model(name, cursor.stage, carried, rehearse=rehearse),
                self.tokenizer,
            )
            torch.manual_seed(draw_key(seed, "objectives", cursor.stage))
            context = BuildContext(model, sources, loader.classes().get(stage.data.label or "", ()))
            objectives = nn.ModuleDict({options.name: build_objective(options, context) for options in stage.objectives})
            weighted = [Weighted(o.name, objectives[o.name], o.weight) for o in stage.objectives]  # type: ignore[arg-type]
            asked = {entry.name: entry.objective.requires for entry in weighted}
            check_caches(asked, stage.companions, stage.data)
            companions = sources.companions(asked, self.note)
            check_offers(asked, {**companions.models(), "model": model})
            engine = Engine(model, weighted, companions, self.communicator, seed=seed, precision=stage.train.precision)
            freeze_objectives(objectives, tuning)
            check_rates(model, objectives, tuning)
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
        return loader_of(
            stage, model, source, tokenizer=self.tokenizer, communicator=self.communicator, quarantine=self.directory.root
        )

    def _check_evaluations(self, model: Model, now: int) -> None:
        """Raises RequestError or DataError, before anything is trained, for what could not be measured when it is."""
        for stage in self.stages[now:]:
            if stage.evaluation.tasks and (stage is self.stages[-1] or stage.evaluation.every != 0):
                data = stage.data
                check_tasks(model, self.tokenizer, stage.evaluation.tasks, data.val, Reading.of(data))

    def _evaluate_inside(self, parts: Parts) -> dict[str, float]:
        """Evaluation during training; it changes nothing but the mode of the model."""
        parts.model.eval()
        tasks = parts.stage.evaluation.tasks
        settings = evaluation_settings(parts.stage, self.note)
        values = numbers_of(evaluate_in_memory(parts.model, self.tokenizer, tasks, parts.stage.data.val, **settings))
        parts.model.train()
        return values


def _prepared(data: DataOptions, model: Model) -> str:
    """A name for what an embedding stands for beside the weights: from where and how samples are read. Archives of two stages
    may call different samples alike."""
    read = data.model_dump(mode="json", exclude={"val", "workers", "prefetch", "bad_samples"})
    pictures = {name: asdict(preprocess) for name, preprocess in (model.preprocesses() or {}).items()}
    return f"{draw_key(0, 'prepared', json.dumps([read, pictures], sort_keys=True)):016x}"


def _silent(text: str) -> None:
    return None
