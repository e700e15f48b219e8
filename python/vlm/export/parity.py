"""Does the bundle say what the model says? Every graph at several shapes, then whole pictures and texts.

A graph that silently computes something else (`scatter_reduce` with a mean exports so) is caught here, because every
graph runs at shapes other than the one it was traced at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.config.errors import GateFailed
from vlm.runtime.session import open_session
from vlm.types.export import ExportPart

BATCHES = (1, 2, 5)
LENGTHS = (1, 7)


@dataclass(frozen=True)
class Tolerance:
    """cosine: least cosine of any row; max_abs: greatest difference of any value, over the largest value of the output.

    picture_cosine: least cosine of whole pictures, where the graph's resize may differ from Pillow's by a level. nats:
    greatest difference of a golden token's -log p.
    """

    cosine: float = 0.9999
    max_abs: float = 1e-3
    picture_cosine: float = 0.9999
    nats: float = 1e-2


@dataclass(frozen=True)
class Check:
    """One comparison. cosine: the least of its rows; max_abs: greatest difference, relative to the largest value."""

    part: str
    case: str
    cosine: float
    max_abs: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(part: str, case: str, ours: np.ndarray, theirs: np.ndarray) -> Check:
    """Rows of [..., E] or any other outputs of equal shape. A value that is not finite gives cosine and max_abs NaN."""
    if ours.shape != theirs.shape:
        return Check(part, f"{case}: shapes {ours.shape} and {theirs.shape}", float("nan"), float("nan"))
    a, b = (x.astype(np.float64).reshape(-1, x.shape[-1]) for x in (ours, theirs))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    zero = norms == 0
    cosine = np.where(zero, (np.abs(a - b).max(axis=1) == 0).astype(float), (a * b).sum(1) / np.where(zero, 1, norms))
    largest = max(float(np.abs(b).max(initial=0.0)), 1e-12)
    return Check(part, case, float(cosine.min(initial=1.0)), float(np.abs(a - b).max(initial=0.0)) / largest)


def check_part(name: str, part: ExportPart, path: Path, *, vocab_size: int, longest: int) -> list[Check]:
    """A graph file against the module it came from, at every batch and length (to `longest`) that its axes allow."""
    session = open_session(path)
    known = {given.name for given in session.get_inputs()}
    checks = []
    for case, inputs in _cases(part, vocab_size, longest):
        with torch.no_grad():
            raw = part.module.eval()(*inputs.values())
        wanted = raw if isinstance(raw, (tuple, list)) else (raw,)
        got = session.run(list(part.outputs), {k: v.numpy() for k, v in inputs.items() if k in known})
        for output, ours, theirs in zip(part.outputs, got, wanted):
            checks.append(compare(f"{name}.{output}", case, ours, theirs.float().numpy()))
    return checks


def _cases(part: ExportPart, vocab_size: int, longest: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Inputs at several shapes: random pixels or ids, the last valid id of a row as in the example."""
    axes = {axis for dims in part.dynamic.values() for axis in dims.values()}
    lengths = sorted({*(n for n in LENGTHS if n <= longest), longest}) if "length" in axes else [longest]
    for batch in BATCHES if "batch" in axes else (1,):
        for length in lengths:
            random = torch.Generator().manual_seed(1000 * batch + length)
            sizes = {"batch": batch, "length": length}
            inputs = {}
            for name, example in part.inputs.items():
                dims = part.dynamic.get(name, {})
                shape = [sizes[dims[i]] if i in dims else n for i, n in enumerate(example.shape)]
                inputs[name] = _values(name, example, shape, vocab_size, random)
            text = any(v.dtype == torch.int64 for v in inputs.values())
            yield f"batch {batch}, length {length}" if text else f"batch {batch}", inputs


def _values(name: str, example: Tensor, shape: list[int], vocab_size: int, random: torch.Generator) -> Tensor:
    if name == "attention_mask":
        mask = torch.ones(shape, dtype=example.dtype)
        mask[-1, max(1, shape[1] // 2) :] = 0  # one row that is padded
        return mask
    if example.dtype == torch.int64:
        ids = torch.randint(0, vocab_size, shape, generator=random)
        ids[:, -1] = example[0, -1]
        return ids
    return torch.randn(shape, generator=random)


def require(checks: Sequence[Check], tolerance: Tolerance) -> None:
    """Raises GateFailed naming the worst check when any is outside the tolerance; NaN is outside."""
    failed = []
    for check in checks:
        least = tolerance.picture_cosine if check.part == "picture" else tolerance.cosine
        # A picture passes through a resize that may differ by a level of 255: its cosine is the measure.
        near = check.part == "picture" or check.max_abs <= tolerance.max_abs
        if not (check.cosine >= least and near):
            failed.append(check)
    if failed:
        worst = min(failed, key=lambda c: (c.cosine if c.cosine == c.cosine else -2.0))
        raise GateFailed(
            f"the exported {worst.part} differs from the model at {worst.case}: cosine {worst.cosine:.6f} "
            f"(expected {tolerance.cosine}), relative difference {worst.max_abs:.2e} (expected {tolerance.max_abs:.0e}); "
            f"{len(failed)} of {len(checks)} checks failed",
            remedy="nothing was published; an operator of this model has no faithful ONNX form, or try another --opset",
        )
