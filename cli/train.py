"""`vlm pretrain`, `vlm finetune` and `vlm distill`: one trainer, three doors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vlm.cli.completion import complete_override, complete_preset
from vlm.config.errors import ExitCode

_EPILOG = "KEY=VALUE changes any setting: train.steps=500 optimizer.lr=3e-4 objectives.contrastive.targets=groups"


def _command(name: str, help_text: str) -> click.Command:
    @click.command(name=name, help=help_text, epilog=_EPILOG)
    @click.argument("preset", required=False, shell_complete=complete_preset)
    @click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...", shell_complete=complete_override)
    @click.option("--data", metavar="URI", help="training data: tar shards, a folder, JSON lines, CSV or scenes:")
    @click.option("--val", metavar="URI", help="data for evaluation")
    @click.option("--output", type=click.Path(path_type=Path), help="run directory [default: runs/PRESET]")
    @click.option("--model", metavar="DIR", help="model to start from: a run, a Hugging Face directory, or a preset to train first")
    @click.option("--teacher", metavar="DIR", help="model of [companions.teacher]: likewise")
    @click.option("-n", "--processes", type=click.IntRange(min=1), help="data-parallel processes on this machine")
    @click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="continue the run in DIR")
    @click.option("--strict", is_flag=True, help="with --resume: fail on an altered checkpoint instead of using the one before")
    @click.option("--dry-run", is_flag=True, help="say what would run (parameters, memory, disk, time) and stop")
    @click.option("--json", "as_json", is_flag=True, help="print the result as one JSON object")
    @click.option("--no-report", is_flag=True, help="do not write report.html at the end")
    def command(**arguments: Any) -> None:
        from vlm.cli import training_job

        job = training_job.Job(command=name, **arguments)
        code = training_job.run(job, sys.argv[1:])
        if code is not ExitCode.DONE:
            sys.exit(int(code))

    return command


pretrain = _command("pretrain", "Train a model from scratch by a preset.")
finetune = _command("finetune", "Train a model further: fully, in parts, or through adapters.")
distill = _command("distill", "Train a student from a teacher.")
