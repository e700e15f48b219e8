"""Linear layers whose weight is read rather than called: in fused products an adapter would otherwise say nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def weight_of(layer: nn.Linear) -> Tensor:
    """[out, in]: what the layer multiplies by, the update of its low-rank adapters included unless they are switched off.

    Dropout of adapters has no place here: it is one of the layer's input.
    """
    weight: Tensor = layer.weight
    adapted: Any = layer
    if not hasattr(layer, "lora_A") or adapted.disable_adapters or adapted.merged:
        return weight
    for name in adapted.active_adapters:
        weight = weight + adapted.get_delta_weight(name)
    return weight
