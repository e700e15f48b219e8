"""What a training command does: settings to preset, dry run or run, result to the shell."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.cli.output import echo_json, echo_result, log, wants_bar
from vlm.config.errors import CheckpointError, ExitCode, RequestError
from vlm.config.machine import usable_cores


@dataclass
class Job:
    """The arguments of one training command."""

    command: str
    preset: str | None
    overrides: tuple[str, ...]
    data: str | None
    val: str | None
    output: Path | None
    model: str | None
    teacher: str | None
    processes: int | None
    resume: Path | None
    strict: bool
    dry_run: bool
    as_json: bool
    no_report: bool

    def all_overrides(self) -> list[str]:
        """Options first, KEY=VALUE last, so that the latter win."""
        given = {
            "data.source": self.data,
            "data.val": self.val,
            "start.model": self.model,
            "companions.teacher.source": self.teacher,
            "scale.processes": self.processes,
        }
        options = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
        return options + list(self.overrides)


def overrides_of(job: Job, name: str) -> list[str]:
    """What the command line changes in the preset.

    --model for a preset that starts from parts: a finetuning preset whose parts are all of one model gets them all from DIR, and its own
    architecture stays; for any other DIR is the whole model, and no part is laid over it. Parts that the command line names
    are left as they are said.
    """
    given = job.all_overrides()
    if job.model is None or any(text.startswith("start.parts") for text in job.overrides):
        return given
    from vlm.config.load import resolve

    values = resolve(name).values
    parts = values.get("start", {}).get("parts", {})
    if not isinstance(parts, dict) or not parts:
        return given
    place = json.dumps(job.model, ensure_ascii=False)
    if len(set(parts.values())) == 1 and values.get("method", {}).get("command") == job.command == "finetune":
        given.remove(f"start.model={place}")
        return [*(f"start.parts.{json.dumps(part)}={place}" for part in parts), *given]
    return ['start.parts="!delete"', *given]


def settings_of(preset: str | None, overrides: tuple[str, ...], resume: Path | None) -> tuple[str | None, tuple[str, ...]]:
    """PRESET and KEY=VALUE apart; with --resume the first word may already be a setting, which is refused."""
    if resume is not None:
        if preset is not None or overrides:
            raise RequestError(
                "--resume takes its settings from the run and allows no preset and no changes",
                remedy="start a new run with --model DIR to change settings",
            )
        return None, ()
    if preset is None:
        raise RequestError("no preset given", remedy="vlm presets list shows them")
    return preset, overrides


def run(job: Job, arguments: Sequence[str]) -> ExitCode:
    """Do the job; errors go up as VlmError."""
    from vlm.training.communicators import joined
    from vlm.training.directory import RunDirectory
    from vlm.training.preset import load_preset
    from vlm.training.run import Run
    from vlm.training.trainer import Interrupted

    name, _ = settings_of(job.preset, job.overrides, job.resume)
    preset: Any = None
    resolved: Any = None
    if name is not None:
        preset, resolved = load_preset(name, overrides_of(job, name))
        _check_command(job, preset)
        output = job.output or Path("runs") / preset.method.key
        if not job.dry_run:
            if "RANK" not in os.environ:  # before a base is trained for nothing; a rank may find what rank 0 has begun
                RunDirectory(output).refuse_used()
            try:
                preset, resolved = _with_bases(preset, resolved, bar=wants_bar() and not job.as_json)
            except Interrupted as signal:
                log("interrupted while a base was trained; the same command goes on from there")
                return signal.code
    else:
        assert job.resume is not None
        output = job.resume
        refuse_bundle(output)
        if (output / "preset.toml").is_file():
            preset, resolved = load_preset(str(output / "preset.toml"))
        elif job.dry_run:
            raise CheckpointError("not a run: preset.toml is missing", where=str(output))
    processes = job.processes or (preset.scale.processes if preset is not None else 1)
    if resolved is not None:
        _check_sizes(resolved, processes)
    if processes > 1 and "RANK" not in os.environ and not job.dry_run:
        from vlm.training.launch import launch

        threads = max(1, usable_cores() // processes)
        return _as_code(launch(arguments, processes, threads))
    with joined() as communicator:
        settings: dict[str, Any] = {"communicator": communicator, "note": log, "progress": wants_bar() and not job.as_json}
        if job.dry_run:
            return _dry_run(job, preset, resolved, output, settings)
        if name is not None:
            assert preset is not None
            training = Run.begin(output, preset, resolved, **settings)
        else:
            training = Run.resume(output, **settings)
        try:
            result = training.train(strict=job.strict)
        except Interrupted as signal:
            if communicator.rank == 0:
                log(f"interrupted; continue with: vlm {job.command} --resume {output}")
            return signal.code
        if communicator.rank == 0:
            answer = result.to_json()
            if any(option.kind == "classification" and option.head == "own" for option in training.stages[-1].objectives):
                answer["head"] = str(output / "objectives.safetensors")
            _card(output)
            if not job.no_report:
                answer["report"] = _report(output)
            if job.as_json:
                echo_json(answer)
            else:
                echo_result(_summary(answer))
    return ExitCode.DONE


def _as_code(code: int) -> ExitCode:
    return ExitCode(code) if code in ExitCode._value2member_map_ else ExitCode.RUN_FAILED


def _check_command(job: Job, preset: Any) -> None:
    """A pretraining preset may be finetuned when a model is given; everything else wants its own command."""
    wanted = preset.method.command
    if job.command == wanted or (job.command == "finetune" and wanted == "pretrain" and preset.start.model is not None):
        return
    raise RequestError(
        f"{preset.method.key} is a preset of vlm {wanted}",
        remedy=f"run: vlm {wanted} {job.preset}" + (" (or give --model DIR to finetune it)" if wanted == "pretrain" else ""),
    )


def _with_bases(preset: Any, resolved: Any, *, bar: bool) -> tuple[Any, Any]:
    """The preset with directories in place of the presets that it names as models; those are trained first, once."""
    from vlm.workflows.bases import BaseStore, own_units

    units = own_units(resolved.values)
    return _replaced(preset, resolved, BaseStore(note=log, progress=bar).ready(units)) if units else (preset, resolved)


def _replaced(preset: Any, resolved: Any, models: dict[str, Path]) -> tuple[Any, Any]:
    from vlm.config.load import validate
    from vlm.workflows.bases import with_bases

    placed = with_bases(resolved, models)
    return validate(placed, type(preset)), placed


def refuse_bundle(path: Path) -> None:
    """A bundle holds the preset it was made by, and yet is no run. Raises RequestError."""
    from vlm.runtime.manifest import is_bundle

    if is_bundle(path):
        raise RequestError("this is a bundle, not a run", where=str(path), remedy="give the run directory that it was exported from")


def _check_sizes(resolved: Any, processes: int) -> None:
    """Every process needs a sample for each of its micro-batches. Raises RequestError."""
    from vlm.training.preset import stages_of

    for stage in stages_of(resolved):
        size, accumulate = stage.train.batch_size, stage.train.accumulate
        if size < processes * accumulate:
            raise RequestError(
                f"{size} samples cannot be shared by {processes} processes of {accumulate} micro-batches",
                where=f"stage {stage.name}: train.batch_size",
                remedy=f"expected at least {processes * accumulate}; or use fewer processes (-n) or a smaller train.accumulate",
            )


def _dry_run(job: Job, preset: Any, resolved: Any, output: Path, settings: dict[str, Any]) -> ExitCode:
    """Assemble every stage in a temporary directory, measure one small update of each, print the plans."""
    import tempfile

    from vlm.training.directory import RunDirectory
    from vlm.training.plan import duration, resident
    from vlm.training.rehearsal import plans_of
    from vlm.training.run import Run
    from vlm.workflows.bases import BaseStore, own_units

    before = resident()
    with tempfile.TemporaryDirectory(prefix="vlm-dry-run-") as folder:
        bases = BaseStore(note=log).rehearsed(own_units(resolved.values), Path(folder) / "bases")
        if bases:
            preset, resolved = _replaced(preset, resolved, {base.key: base.model for base in bases})
        plans = plans_of(Run(RunDirectory(Path(folder) / "run"), preset, resolved, **settings), str(output), before=before)
    if job.as_json:
        told = [
            {"preset": base.key, "output": str(base.place), "trained": base.plans is None, "seconds": base.seconds} for base in bases
        ]
        echo_json(
            {"preset": preset.method.key, "output": str(output), "bases": told, "stages": [plan.to_json() for plan in plans]}
        )
    else:
        for base in bases:
            state = "there already" if base.plans is None else f"would be trained first, once: about {duration(base.seconds)}"
            echo_result(f"base {base.key}: {state} ({base.place})")
        for plan in plans:
            echo_result("\n".join(plan.lines()))
    return ExitCode.DONE


def _report(output: Path) -> str | None:
    """The report page; its failure never fails a finished run."""
    from vlm.reporting import write_report

    try:
        return str(write_report(output))
    except Exception as error:
        log(f"the report could not be written: {error}")
        return None


def _card(output: Path) -> None:
    """The card of the model; its failure never fails a finished run."""
    from vlm.reporting import write_card

    try:
        write_card(output)
    except Exception as error:
        log(f"the model card could not be written: {error}")


def _summary(answer: dict[str, Any]) -> str:
    from vlm.evaluation.table import table_of

    lines = [table_of(result) for result in answer["evaluations"]]
    lines.append(f"{answer['parameters']:,} parameters, {answer['steps']} updates, {answer['seconds']:.0f} s")
    lines.append(f"model:  {answer['model']}")
    if "head" in answer:
        use = f"vlm predict {answer['output']} IMAGE uses it; vlm evaluate --task linear-probe fits its own"
        lines.append(f"head:   {answer['head']}  ({use})")
    if answer.get("report"):
        lines.append(f"report: {answer['report']}")
    return "\n".join(lines)
