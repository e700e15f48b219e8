"""Cases of selection for long contexts: hierarchical search and attention over what it found, beside exact attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlm import ops
from vlm.attention.block_memory import BlockMemoryOptions
from vlm.attention.hierarchical import HierarchicalOptions
from vlm.bench.case import Arm, Case, Work, with_backend
from vlm.models import LanguageOptions
from vlm.types import TokenIds, VocabularyLayout

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


def block_memory(length: int) -> Callable[[], dict[Arm, Work]]:
    """q [8, N, 64] over k, v [2, N, 64], read at once into an empty memory: about 400 keys seen, see `WRITING`."""

    def build() -> dict[Arm, Work]:
        generator = torch.Generator().manual_seed(length)
        q = torch.randn(8, length, 64, generator=generator)
        k, v = (torch.randn(2, length, 64, generator=generator) for _ in range(2))
        memory = BlockMemoryOptions.model_validate(WRITING["block-memory"]).build()

        @torch.inference_mode()
        def ours() -> object:
            return memory(q, k, v, memory.start(8, 2, 64, like=q))

        @torch.inference_mode()
        def exact() -> object:
            return ops.attention(q[None], k[None], v[None], causal=True)

        return {"native": with_backend("native", ours), "torch": with_backend("torch", ours), "dispatched": ours, "peer": exact}

    return build


WRITING: dict[str, dict[str, Any]] = {
    "hierarchical": {"kind": "hierarchical", "k": 256},
    "block-memory": {"kind": "block-memory", "n_init": 16, "n_local": 256, "block": 16, "topk": 8, "chunk": 64},
    "window": {"kind": "windowed", "window": 384, "sinks": 16},
}
"""Kinds of attention of a decoder that see about 400 keys."""


def writing(kind: str, read: int, tokens: int = 8) -> Callable[[], dict[Arm, Work]]:
    """Some tokens of one row behind a cache of `read` positions, by a model shaped as lm-tiny; the peer sees every key."""

    def build() -> dict[Arm, Work]:
        ids = torch.randint(3, 4096, (1, read), generator=torch.Generator().manual_seed(read))
        row = TokenIds(ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(1))

        def arm(attention: dict[str, Any] | None) -> Work:
            torch.manual_seed(0)
            table = dict(width=256, depth=4, heads=4, kv_heads=2, ffn_width=704, length=read + tokens, vocab_size=4096)
            options = LanguageOptions.model_validate(table | {"attention": attention})
            model = options.build(VocabularyLayout.of_text(4096, {"pad": 0, "eos": 1, "bos": 2})).eval()
            with torch.inference_mode():
                begun = model.prefill(row, {})[1]

            @torch.inference_mode()
            def run() -> object:
                cache, logits = begun, None
                for _ in range(tokens):
                    logits, cache = model.advance(torch.tensor([5]), cache)
                return logits

            return run

        return {"dispatched": arm(WRITING[kind]), "peer": arm(None)}

    return build


SELECTION_CASES: tuple[Case, ...] = (
    *(
        Case(f"hierarchical/{name}/{keys}", EXACT, hierarchical(queries or keys, keys))
        for name, queries in (("prefill", 0), ("last-block", 32))
        for keys in (1024, 2048, 4096, 8192, 16384)
    ),
    *(
        Case(f"block-memory/prefill/{length}", EXACT, block_memory(length))
        for length in (1024, 2048, 4096, 8192, 16384)
    ),
    *(
        Case(f"long-row/{kind}/{read}", "the same model, which sees every key", writing(kind, read), native=False)
        for kind in WRITING
        for read in (1024, 4096, 16384)
    ),
)
