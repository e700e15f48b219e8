"""Does a decoder graph say what its module says, at lengths, caches and paddings other than the traced ones?

b rows, s new positions, p cached ones, K kept ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlm.export.parity import Check, compare
from vlm.runtime.session import open_session
from vlm.runtime.stepper import most_kept
from vlm.types.export import ExportPart

SHAPES = ((1, 1, 0), (1, 1, 6), (1, 9, 0), (2, 1, 3), (2, 5, 4), (3, 7, 0), (3, 1, 11))
"""(b, s, p)"""


def has_cache(part: ExportPart) -> bool:
    """Whether a part is a decoder that keeps or takes keys and values."""
    return any(axis.startswith(("past", "kept")) for dims in part.dynamic.values() for axis in dims.values())


def check_cached(name: str, part: ExportPart, path: Path) -> list[Check]:
    """A decoder graph against its module: every shape with rows padded on the left, on the right and not at all."""
    session = open_session(path)
    known = {given.name for given in session.get_inputs()}
    checks = []
    for case, inputs in _cases(part):
        with torch.no_grad():
            wanted = part.module.eval()(*inputs.values())
        got = session.run(list(part.outputs), {k: v.numpy() for k, v in inputs.items() if k in known})
        checks += [compare(f"{name}.{o}", case, a, b.float().numpy()) for o, a, b in zip(part.outputs, got, wanted)]
    return checks


def _cases(part: ExportPart) -> Iterator[tuple[str, dict[str, Tensor]]]:
    prefill = "picture_ids" in part.inputs
    for batch, new, past in SHAPES:
        if prefill and (past or new == 1):
            continue
        for side in ("none", "left", "right") if batch > 1 else ("none",):
            random = torch.Generator().manual_seed(100 * batch + 10 * new + past)
            inputs = _inputs(part, batch, new, past, side, random)
            yield f"batch {batch}, {new} behind {past}, padding {side}", inputs


def _inputs(part: ExportPart, batch: int, new: int, past: int, side: str, random: torch.Generator) -> dict[str, Tensor]:
    sizes = {"batch": batch, "length": new, "visual": 5}
    for stage, count in ((dims, _past(dims, past)) for dims in _axes(part) if dims.startswith("past")):
        sizes[stage] = count
        sizes[stage.replace("past", "total")] = count + new
    picture = _pictures(batch, new)
    out: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    for name, example in part.inputs.items():
        dims = part.dynamic.get(name, {})
        if name.startswith("kept."):
            module = part.module
            count = list(module.counts.values())[int(name[5:]) - 1]  # type: ignore[operator]
            most = most_kept(out["attention_mask"].numpy(), picture.numpy(), count)
            out[name] = torch.arange(most)
            continue
        shape = [sizes[dims[i]] if i in dims else n for i, n in enumerate(example.shape)]
        head, _, stage = name.partition(".")
        if head == "attention_mask":
            masks[stage] = out[name] = _mask(shape, side, new)
        elif head == "position_ids":
            out[name] = (masks[stage].cumsum(1) - 1).clamp(min=0)[:, -new:].contiguous()
        elif head == "picture_ids":
            out[name] = picture = torch.where(out["attention_mask"] > 0, picture, -1)
        elif head == "cross_mask":
            out[name] = torch.randint(0, 2, shape, generator=random)
            out[name][-1] = 0
        else:
            out[name] = torch.randn(shape, generator=random)
    return out


def _axes(part: ExportPart) -> list[str]:
    return sorted({axis for dims in part.dynamic.values() for axis in dims.values()})


def _past(axis: str, past: int) -> int:
    """Later stages hold fewer positions."""
    return max(0, past - int(axis.partition("_")[2] or 0))


def _mask(shape: list[int], side: str, new: int) -> Tensor:
    """Row i lacks i positions on its side, but never all of the new ones."""
    mask = torch.ones(shape, dtype=torch.int64)
    for row in range(shape[0]):
        lost = min(row, new - 1 if side == "right" else shape[1] - 1)
        if side == "left":
            mask[row, :lost] = 0
        elif side == "right":
            mask[row, shape[1] - lost :] = 0
    return mask


def _pictures(batch: int, length: int) -> Tensor:
    """A text, a picture, a text, a second one that ends the row in some rows: [b, s] of picture numbers."""
    place = np.arange(length)
    row = np.where((place >= 1) & (place < 1 + length // 2), 0, -1)
    rows = np.stack([np.where((place > 1 + length // 2) & (place < length - (i != 1)), 1, row) for i in range(batch)])
    return torch.from_numpy(rows.astype(np.int64))
