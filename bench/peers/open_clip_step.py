"""One training step of `clip-tiny` against open_clip's, median of interleaved pairs in two processes that take turns.

    python -m vlm.bench.peers.open_clip_step --peer OTHER/bin/python [--pairs 10] [--json]

OTHER is an environment with torch, open_clip_torch and this file's neighbour `open_clip_training.py` on its path.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def serve_steps(threads: int, batch: int, length: int, native: str) -> None:
    """Our side: one line in, one timed step out."""
    import torch

    from vlm import ops
    from vlm.models import DualEncoderOptions
    from vlm.objectives import BuildContext, ContrastiveOptions
    from vlm.ops import keep_freed_memory
    from vlm.training.companions import Companions
    from vlm.training.engine import Clock, Engine, Weighted
    from vlm.training.optimizer import NamedOptimizer, OptimizerOptions
    from vlm.training.preset import load_preset
    from vlm.types import Batch, Pictures, SingleProcess, TokenIds, VocabularyLayout

    keep_freed_memory()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    options = load_preset("clip-tiny")[0].model
    assert isinstance(options, DualEncoderOptions)
    model = options.build(VocabularyLayout.of_text(4096, {"bos": 1, "eos": 4095, "pad": 0}))
    objective = ContrastiveOptions()
    entry = Weighted("contrastive", objective.build(BuildContext(model)), 1.0)
    engine = Engine(model, [entry], Companions(), SingleProcess(), seed=0)
    optimizer = NamedOptimizer(OptimizerOptions(), dict(model.named_parameters()), ())
    index = torch.arange(batch)
    valid = torch.ones(batch, dtype=torch.bool)
    ids = torch.randint(4, 4095, (batch, length))
    ids[:, length - 1] = 4095
    streams = {
        "image": Pictures(torch.randint(0, 256, (batch, 3, 64, 64), dtype=torch.uint8), valid, index),
        "text": TokenIds(ids, torch.ones_like(ids, dtype=torch.bool), index),
    }
    data = Batch(streams, [""] * batch, index, index * 0)
    with ops.backend(native):  # type: ignore[arg-type]
        for number, _ in enumerate(sys.stdin):
            started = time.perf_counter()
            optimizer.zero_grad()
            engine.update([data], Clock(number, 100))
            optimizer.step(1.0)
            print(time.perf_counter() - started, flush=True)


def turn(process: subprocess.Popen[str]) -> float:
    """Ask one side for one step."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", help="Python of the environment that has open_clip_torch")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--backend", default="auto", choices=("auto", "native", "torch"))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_steps(given.threads, given.batch, given.length, given.backend)
        return
    if not given.peer:
        parser.error("--peer is needed")
    shape = ["--threads", str(given.threads), "--batch", str(given.batch), "--length", str(given.length)]
    ours_command = [sys.executable, "-m", "vlm.bench.peers.open_clip_step", "--serve", "--backend", given.backend, *shape]
    peer_command = [given.peer, str(Path(__file__).with_name("open_clip_training.py")), "steps", *shape]
    sides = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for command in (ours_command, peer_command)
    ]
    try:
        for _ in range(given.warmup):
            for side in sides:
                turn(side)
        pairs = [(turn(sides[0]), turn(sides[1])) for _ in range(given.pairs)]
    finally:
        for side in sides:
            side.kill()
            side.wait()
    ours, peer = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(b / a for a, b in pairs)
    result = {"case": "clip-tiny step", "ours_s": ours, "peer_s": peer, "ratio": ratio, "pairs": given.pairs, "threads": given.threads}
    if given.json:
        print(json.dumps(result))
    else:
        print(f"ours {ours:.3f} s, open_clip {peer:.3f} s: {ratio:.2f}x its speed (median of {given.pairs} pairs, {given.threads} threads)")


if __name__ == "__main__":
    main()
