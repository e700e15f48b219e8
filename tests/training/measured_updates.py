"""Real updates of a preset in a process of their own: PRESET UPDATES [KEY=VALUE]... prints their memory and time as JSON."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from vlm.ops import keep_freed_memory
from vlm.training.directory import RunDirectory
from vlm.training.metrics import MetricsLog
from vlm.training.plan import _peak, resident
from vlm.training.preset import load_preset
from vlm.training.run import Run
from vlm.training.trainer import Cursor, Trainer


def main() -> None:
    preset, resolved = load_preset(sys.argv[1], sys.argv[3:])
    before = resident()
    keep_freed_memory()
    torch.set_num_threads(preset.scale.threads or 1)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(RunDirectory(Path(folder)), preset, resolved, note=lambda text: None)
        parts = run.assemble(run.stages[0], Cursor(), initial=True)
        trainer = Trainer(parts, Cursor(), None, MetricsLog(None), run.communicator)  # type: ignore[arg-type]  # nothing is saved
        seconds = []
        for _ in range(int(sys.argv[2])):
            started = time.perf_counter()
            trainer.step()
            trainer.cursor.step += 1
            seconds.append(time.perf_counter() - started)
        parts.loader.close()
    print(json.dumps({"before": before, "peak": _peak(), "seconds": statistics.median(seconds[1:])}))


main()
