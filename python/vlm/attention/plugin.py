"""The native attention inside models of `transformers`: `register()`, then `attn_implementation="vlm_native"`.

B batch, H query heads, G key/value heads, N queries, M keys, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlm import ops
from vlm.ops import masks

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
    or the module's own flag decides. A boolean mask whose rows are ranges of keys (causal, padded, sliding, packed) costs
    only the tiles that it keeps; any other stays boolean. softcap: of the logits. s_aux [H]: one more logit for each head
    that takes its share of the softmax and gives nothing (attention sinks).
    Attention dropout draws its seed from torch's generator; under `torch.compile` it goes to torch's implementation.
    """
    if dropout > 0.0 and torch.compiler.is_compiling():
        if softcap is not None or s_aux is not None:
            raise ValueError(f'"{NAME}" has no compiled dropout with soft caps or sinks; use attn_implementation="eager"')
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
                                      is_causal=is_causal, position_bias=position_bias)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    key_mask, program, bias = None, None, position_bias
    if attention_mask is not None:
        allow = attention_mask[..., : key.shape[2]]
        if allow.dtype != torch.bool:
            bias = allow if bias is None else bias + allow
        else:
            key_mask, causal, program = _lower(allow, query.shape[0], query.shape[2])
    dropped = (dropout, int(torch.randint(2**62, ()))) if dropout > 0.0 else None
    options: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "mask": program, "bias": bias, "scale": scaling,
                               "softcap": softcap, "dropout": dropped}
    if s_aux is None:
        out = ops.attention(query, key, value, **options)
    else:
        out, lse = ops.attention(query, key, value, **options, return_lse=True)
        out = out * torch.sigmoid(lse - s_aux.to(lse.dtype)[None, :, None])[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _lower(allow: Tensor, batch: int, queries: int) -> tuple[Tensor | None, bool, masks.MaskProgram | None]:
    """(key mask [B, M], causal, other atoms) of a boolean mask [B | 1, H | 1, N, M]."""
    plain = _plain_form(allow, queries)
    if plain is not None:
        return plain[0].expand(batch, -1), plain[1], None
    ranges = _ranges_form(allow)
    if ranges is not None:
        rows, keys = ranges
        return None if keys is None else keys.expand(batch, -1), False, masks.MaskProgram(masks.Rows(rows))
    return None, False, masks.MaskProgram(masks.Dense(allow))


def _visible(allow: Tensor) -> bool:
    """Whether the values of a mask, the same for all heads, can be looked at."""
    return not torch.compiler.is_compiling() and allow.device.type == "cpu" and allow.shape[1] == 1 and allow.numel() > 0


def _ranges_form(allow: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """(ranges [B | 1, N, 2], keys that any query sees [B | 1, M] or None if all) where each row of `allow` is one range of
    the keys that exist, as of sliding windows and packed texts; None where it is not so, or cannot be looked at."""
    if not _visible(allow):
        return None
    rows = allow[:, 0]
    keys = rows.any(1)
    count = rows.sum(2)
    first = rows.to(torch.uint8).argmax(2)
    end = rows.shape[2] - rows.flip(2).to(torch.uint8).argmax(2)
    end = torch.where(count > 0, end, first)
    before = torch.nn.functional.pad(keys.cumsum(1), (1, 0))
    if not torch.equal(count, before.gather(1, end) - before.gather(1, first)):
        return None
    return torch.stack([first, end], 2), None if bool(keys.all()) else keys


def _plain_form(mask: Tensor, queries: int) -> tuple[Tensor, bool] | None:
    """(key mask [B | 1, M], causal) if `mask` is nothing but padded keys and perhaps a causal edge, so that the kernel
    can skip tiles; None if not, or where the values cannot be looked at (compiling, exporting, other devices)."""
    if not _visible(mask):
        return None
    keys = mask[:, 0, -1, :]
    if torch.equal(mask, keys[:, None, None, :].expand_as(mask)):
        return keys, False
    edge = torch.ones(queries, mask.shape[-1], dtype=torch.bool).tril(mask.shape[-1] - queries)
    return (keys, True) if torch.equal(mask, keys[:, None, None, :] & edge) else None
