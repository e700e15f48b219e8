"""Cases of selection for long contexts: hierarchical search and attention over what it found, beside exact attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlm import ops
from vlm.attention.hierarchical import HierarchicalOptions
from vlm.bench.case import Arm, Case, Work, with_backend

EXACT = "vlm.ops.attention, causal, over all keys"


def hierarchical(queries: int, keys: int) -> Callable[[], dict[Arm, Work]]:
    """q [1, 8, N, 64] over k, v [1, 2, M, 64]: budget 512, window 128, 16 first keys."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(keys)
        q = torch.randn(1, 8, queries, 64, generator=generator)
        k, v = (torch.randn(1, 2, keys, 64, generator=generator) for _ in range(2))
        attend = HierarchicalOptions().build()

        @torch.no_grad()
        def ours() -> object:
            return attend(q, k, v)

        @torch.no_grad()
        def exact() -> object:
            return ops.attention(q, k, v, causal=True)

        return {"native": with_backend("native", ours), "dispatched": ours, "peer": exact}

    return build


SELECTION_CASES: tuple[Case, ...] = tuple(
    Case(f"hierarchical/{name}/{keys}", EXACT, hierarchical(queries or keys, keys))
    for name, queries in (("prefill", 0), ("last-block", 32))
    for keys in (1024, 4096, 16384)
)
