"""Cases of window and global attention: one layer of an encoder beside the Longformer layer of transformers.

Equal weights: projections, a symmetric window of 512 positions in all, one global token with projections of its own; without the
output projection, which both have alike. The peer is given its masks, and we our `Sight`, once for all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vlm.attention import TrunkAttentionOptions
from vlm.bench.case import Arm, Case, Work, with_backend
from vlm.layers import TrunkOptions
from vlm.models.attending import AttendingBlock, Turns
from vlm.models.sight import Ranks, sight_of

PEER = "transformers LongformerSelfAttention"
WIDTH, HEADS = 512, 8


def options_of(window: int) -> TrunkOptions:
    """One layer without rotary positions, as the published one."""
    attention = TrunkAttentionOptions.model_validate(
        {"mask": [{"kind": "window-symmetric", "size": window}], "global_tokens": 1, "global_projections": True})
    return TrunkOptions(width=WIDTH, depth=1, heads=HEADS, ffn_width=WIDTH, attention=attention, causal=False)


def peer_of(block: AttendingBlock, window: int) -> Any:
    """The layer of transformers with the weights of `block`."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, attention_window=[window], num_hidden_layers=1,
                              attention_probs_dropout_prob=0.0)
    layer = LongformerSelfAttention(config, 0).eval()
    own: Any = block.global_attention
    for name, short in (("query", "q"), ("key", "k"), ("value", "v")):
        getattr(layer, name).load_state_dict(getattr(block.attention, short).state_dict())
        getattr(layer, f"{name}_global").load_state_dict(getattr(own, short).state_dict())
    return layer


def works_of(length: int, window: int, backward: bool, batch: int = 1) -> tuple[Work, Work]:
    """(ours, the peer's) over the same rows x [B, N, 512], the first token global; both give [B, N, 512]."""
    torch.manual_seed(length)
    options = options_of(window)
    assert isinstance(options.attention, TrunkAttentionOptions)
    block = AttendingBlock(options, options.attention).eval()
    layer = peer_of(block, window)
    x, upstream = torch.randn(batch, length, WIDTH), torch.randn(batch, length, WIDTH)
    x.requires_grad_(backward)
    mask = torch.ones(batch, length, dtype=torch.bool)
    sight, turns = sight_of(options.attention, False, mask, Ranks.of(mask, None)), Turns(None, None)
    is_global = torch.zeros_like(mask)
    is_global[:, 0] = True
    told = torch.where(is_global, 10000.0, 0.0)

    def given(out: torch.Tensor, module: torch.nn.Module) -> object:
        parameters = [p for name, p in module.named_parameters() if name.split(".")[0] not in ("norm1", "norm2", "ffn")
                      and ".out." not in name] if backward else []
        return torch.autograd.grad(out, [x, *parameters], upstream) if backward else out

    def ours() -> object:
        return given(block.look(x, sight, turns)[0].transpose(1, 2).flatten(2), block)

    def peer() -> object:
        return given(layer(x, attention_mask=told, is_index_masked=~mask, is_index_global_attn=is_global, is_global_attn=True)[0], layer)

    return ours, peer


def layer(length: int, window: int, backward: bool) -> Callable[[], dict[Arm, Work]]:
    def build() -> dict[Arm, Work]:
        ours, peer = works_of(length, window, backward)
        return {"native": with_backend("native", ours), "dispatched": ours, "peer": peer}

    return build


LONGFORMER_CASES: tuple[Case, ...] = tuple(
    Case(f"longformer/window-{window}+global/{length}/{'forward+backward' if backward else 'forward'}", PEER,
         layer(length, window, backward), 3.0)
    for length, window in ((1024, 128), (4096, 512)) for backward in (False, True)
)
