"""Peak memory of one arm, in a process of its own: `python -m vlm.bench.memory CASE ARM THREADS` prints MiB.

The kernel's own counter of the peak resident set is reset just before the work, so what came before (torch, the
inputs) is not counted, and what the caller keeps (outputs, gradients) is subtracted.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vlm import ops
from vlm.bench.cases import CASES, Arm, Case

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in {STATUS}")


def _size(kept: object) -> int:
    if isinstance(kept, Tensor):
        return kept.numel() * kept.element_size()
    return sum(_size(t) for t in kept) if isinstance(kept, tuple | list) else 0


def peak_here(case: Case, arm: Arm) -> float:
    """MiB beyond inputs and results, for one run of the arm in this process. OSError where /proc is not Linux's."""
    work = case.build()[arm]
    _wake_up()
    gc.collect()
    CLEAR.write_text("5")
    before = _resident("VmRSS")
    kept = work()
    return max(0, _resident("VmHWM") - before - _size(kept)) / 2**20


def _wake_up() -> None:
    """Run everything once on tiny inputs, so that threads, libraries and lazily imported modules are there."""
    x = torch.randn(64, 64, requires_grad=True)
    with ops.backend("native"):
        rows, columns = ops.contrastive_softmax(x, x, torch.zeros(()))
        out = ops.attention(x.view(1, 1, 64, 64), x.view(1, 1, 64, 64), x.view(1, 1, 64, 64))
        (rows.sum() + columns.sum() + out.sum()).backward()
    F.cross_entropy(x @ x.T, torch.arange(64)).backward()
    q = x.view(1, 1, 64, 64)
    F.scaled_dot_product_attention(q, q, q).sum().backward()


def peak(case: Case, arm: Arm, threads: int) -> float | None:
    """The same in a fresh process; None where the system does not tell."""
    if not CLEAR.exists():
        return None
    command = [sys.executable, "-m", "vlm.bench.memory", case.name, arm, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"measuring the memory of {case.name} ({arm}) failed:\n{done.stderr[-2000:]}")
    return float(done.stdout)


def main() -> None:
    name, arm, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    case = next(c for c in CASES if c.name == name)
    print(peak_here(case, arm))


if __name__ == "__main__":
    main()
