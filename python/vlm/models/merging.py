"""A trunk whose blocks merge similar tokens between attention and feed-forward layer. Source: core-tome.

B rows, N0 tokens before any merge, N tokens now, C width.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vlm.layers import Block, Trunk
from vlm.tokens import MergePlan

State = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Merged:
    """x [B, N, C] after the last block; hidden states by layer; sizes [B, N], how many tokens each stands for, None where
    each stands for itself; places [B, N0], what each token became part of; bias [B, 1, 1, N] for attention over x."""

    x: Tensor
    hidden: dict[int, Tensor] = field(default_factory=dict)
    sizes: Tensor | None = None
    places: Tensor | None = None
    bias: Tensor | None = None


def run_merging(trunk: Trunk, x: Tensor, plan: MergePlan, *, collect: Collection[int] = (), stop: int | None = None) -> Merged:
    """x [B, N0, C] through the first `stop` blocks, all if not given. A plan without pairs is exactly `Trunk.forward`.

    With `plan.restore` x is [B, N0, C] again after the last block, every token what it became part of; hidden states of
    earlier layers stay short.
    """
    hidden = {0: x} if 0 in collect else {}
    state: State = (x, None, None)
    for layer, block in enumerate(trunk.blocks[:stop]):
        assert isinstance(block, Block)
        if trunk.recompute and torch.is_grad_enabled():
            state = checkpoint(_step, block, plan, layer, *state, use_reentrant=False)
        else:
            state = _step(block, plan, layer, *state)
        if layer + 1 in collect:
            hidden[layer + 1] = state[0]
    x, sizes, places = state
    if plan.restore and places is not None:
        x, sizes, places = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1])), None, None
    return Merged(x, hidden, sizes, places, plan.bias(sizes))


def _step(block: Block, plan: MergePlan, layer: int, x: Tensor, sizes: Tensor | None, places: Tensor | None) -> State:
    attention, y = block.attention, block.norm1(x)
    keys, values = attention.keys_values(y)
    x = x + attention.attend(attention.queries(y), keys, values, bias=plan.bias(sizes))
    x, sizes, places = plan.merge(layer, x, keys, sizes, places)
    return x + block.ffn(block.norm2(x)), sizes, places
