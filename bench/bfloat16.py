"""bfloat16 multiplied as it is, beside our own path through float32 (`converted`: the level below) and torch in bfloat16.

On a processor without avx512_bf16 both arms are the same path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from vlm.bench.attention import SDPA, masked
from vlm.bench.case import Arm, Case, Work
from vlm.bench.contrastive import DENSE, contrastive
from vlm.bench.vocabulary import PEER, cross_entropy
from vlm.ops.backend import core


def at_level(level: str, work: Work) -> Work:
    """The work with the core held at `level`."""

    def run() -> object:
        before = core().active_level()
        core().set_level(level)
        try:
            return work()
        finally:
            core().set_level(before)

    return run


def with_converted(build: Callable[[], dict[Arm, Work]]) -> Callable[[], dict[Arm, Work]]:
    """The arms of a bfloat16 case and `converted`."""

    def built() -> dict[Arm, Work]:
        arms = build()
        below = [level for level in core().supported_levels() if level != "avx512_bf16"][-1]
        return {**arms, "converted": at_level(below, arms["native"])}

    return built


def account(times: Mapping[Arm, float]) -> dict[str, object]:
    """How many times as long the path through float32 took."""
    return {"converted_ratio": round(times["converted"] / times["native"], 3)}


def _case(name: str, peer: str, build: Callable[[], dict[Arm, Work]], peer_bytes: int = 0) -> Case:
    return Case(f"bfloat16/{name}", peer, with_converted(build), peer_bytes=peer_bytes, account=account)


HALF = torch.bfloat16

BFLOAT16_CASES: tuple[Case, ...] = (
    *(_case(f"attention-{kind}/{length}/{'forward+backward' if backward else 'forward'}", SDPA, masked(kind, length, backward, HALF))
      for kind, length in (("dense", 256), ("dense", 1024), ("window-256", 4096)) for backward in (False, True)),
    *(_case(f"{form}/{batch}/forward+backward", DENSE, contrastive(form, batch, half=True), 16 * batch**2)
      for form, batch in (("softmax", 1024), ("softmax", 2048), ("sigmoid", 2048))),
    *(_case(f"cross-entropy/{ids}/forward+backward", PEER, cross_entropy(ids, 1024, HALF)) for ids in (4096, 32768)),
)
