"""The native attention inside models of `transformers`: `register()`, then `attn_implementation="vlm_native"`.

B batch, H query heads, G key/value heads, N queries, M keys, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm import ops

NAME = "vlm_native"


def register() -> str:
    """Make "vlm_native" known to transformers; returns the name. Calling it again does no harm.

    Afterwards `model.set_attn_implementation("vlm_native")` switches every model that uses the attention interface
    (CLIP, SigLIP, Llama, LLaVA, Qwen-VL ...). Models with their own attention code (Swin V2) are not reached.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    return NAME


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls: query [B, H, N, D], key and value [B, G, M, D] -> [B, N, H, D], None.

    attention_mask: None, or [B | 1, H | 1, N, >= M], bool (true = attend) or additive. Without a mask, `is_causal`
    or the module's own flag decides. Raises ValueError for what the kernel does not have: logit caps and sinks.
    Attention dropout in training goes to torch's implementation.
    """
    if softcap is not None or s_aux is not None:
        raise ValueError(f'"{NAME}" has no soft cap and no attention sinks; use attn_implementation="eager"')
    if dropout > 0.0:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, position_bias=position_bias)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    key_mask = None
    bias = position_bias
    if attention_mask is not None:
        mask = attention_mask[..., : key.shape[2]]
        plain = _plain_form(mask, query.shape[2]) if mask.dtype == torch.bool else None
        if plain is not None:
            key_mask, causal = plain
            key_mask = key_mask.expand(query.shape[0], -1)
        else:
            added = _additive(mask, query.dtype)
            bias = added if bias is None else bias + added
    out = ops.attention(query, key, value, causal=causal, key_mask=key_mask, bias=bias, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _plain_form(mask: Tensor, queries: int) -> tuple[Tensor, bool] | None:
    """(key mask [B | 1, M], causal) if `mask` is nothing but padded keys and perhaps a causal edge, so that the kernel
    can skip tiles; None if not, or where the values cannot be looked at (compiling, exporting, other devices)."""
    if torch.compiler.is_compiling() or mask.device.type != "cpu" or mask.shape[1] != 1:
        return None
    keys = mask[:, 0, -1, :]
    if torch.equal(mask, keys[:, None, None, :].expand_as(mask)):
        return keys, False
    edge = torch.ones(queries, mask.shape[-1], dtype=torch.bool).tril(mask.shape[-1] - queries)
    return (keys, True) if torch.equal(mask, keys[:, None, None, :] & edge) else None
