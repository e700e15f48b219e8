"""The native attention inside models of `transformers`: `use(model)`, or `register()` and `attn_implementation="vlm_native"`.

B batch, H query heads, G key/value heads, N queries, M keys, D width.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from vlm import ops
from vlm.attention.plugin_masks import hides_nothing, lower, native_mask
from vlm.ops import masks
from vlm.ops.backend import current_backend

NAME = "vlm_native"
_SERVED = frozenset({"module", "query", "key", "value", "attention_mask", "scaling", "dropout", "is_causal", "position_bias", "softcap",
                     "s_aux", "sinks", "kwargs", "_kwargs", "sliding_window", "head_mask"})
"""Parameters of the models' own attention functions that are served, or that the mask says already (sliding_window)."""
_REFUSED = {"cache": "paged caches of continuous batching", "block_indices": "chosen blocks of keys",
            "head_mask": "factors on heads", "output_attentions": "attention probabilities as an output"}


def register() -> str:
    """Make "vlm_native" known to transformers; returns the name. Calling it again does no harm.

    Afterwards `model.set_attn_implementation("vlm_native")` switches every model that uses the attention interface
    (CLIP, SigLIP, Llama, LLaVA, Qwen-VL ...). transformers only warns about models with their own attention code, and
    goes on with that; `use` refuses them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, native_mask)
    return NAME


def use(model: Any) -> None:
    """`register()`, and switch every part of a transformers model to the native attention.

    Raises ValueError that names the parts whose attention does not go through the attention interface (Bloom, Falcon,
    MPT, Swin V2 ...); the model is then as it was. Requests for attention probabilities are refused from then on.
    """
    from transformers import PreTrainedModel

    own = sorted({type(part).__name__ for part in model.modules()
                  if isinstance(part, PreTrainedModel) and not part._can_set_attn_implementation()})
    if own:
        raise ValueError(f'{type(model).__name__}: the attention of {", ".join(own)} does not go through the attention interface of '
                         f'transformers, so "{NAME}" cannot reach it; keep attn_implementation="eager" or "sdpa"')
    model.set_attn_implementation(register())
    if not any(hook is _no_probabilities for hook in model._forward_pre_hooks.values()):
        model.register_forward_pre_hook(_no_probabilities, with_kwargs=True)


def _no_probabilities(model: Any, _args: tuple[Any, ...], options: dict[str, Any]) -> None:
    if options.get("output_attentions") and model.config._attn_implementation == NAME:
        raise _refusal(model, "output_attentions")


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
    sinks: Tensor | None = None,
    indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    mask_program: masks.MaskProgram | masks.Atom | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """The signature that transformers calls: query [B, H, N, D], key and value [B, G, M, D] -> [B, N, H, D], None.

    attention_mask: None, or [B | 1, H | 1, N, >= M], bool (true = attend) or additive. Without a mask, `is_causal`
    or the module's own flag decides; query i then stands at key i (the free places of a static cache lie behind).
    A boolean mask whose rows are ranges of keys (causal, padded, sliding, packed) costs only the tiles that it keeps; any other
    stays boolean. softcap: of the logits. s_aux [H] or sinks [B, H, N, 1]: one more logit that takes its share of the softmax and
    gives nothing (attention sinks). indices [B, N, K]: the only keys that a query may see (sparse attention of DeepSeek).
    cu_seq_lens_q, cu_seq_lens_k: bounds of packed sequences, for B = 1 and where no mask says it already.
    mask_program: stands in place of the mask and of causality, as a mask of 4 axes given to the model would.

    Small calls, and those with few queries, go to torch, which is faster there (see `_torch_is_faster`).
    Attention dropout draws its seed from torch's generator; under `torch.compile` it goes to torch's implementation.
    Raises ValueError, naming module and feature, for what would change the result and is not served.
    """
    _refuse(module, more)
    if query.shape[0] != key.shape[0]:  # learned queries, one set for all rows
        rows = max(query.shape[0], key.shape[0])
        query, key, value = (t.expand(rows, -1, -1, -1) for t in (query, key, value))
    queries, keys = query.shape[2], key.shape[2]
    if attention_mask is not None and attention_mask.dtype == torch.bool and hides_nothing(attention_mask):
        attention_mask, is_causal = None, False
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal) and queries > 1
    causal = causal and attention_mask is None and mask_program is None
    program, key_mask, bias = mask_program, None, position_bias
    if isinstance(program, masks.Atom):
        program = masks.MaskProgram(program)
    if program is not None:
        attention_mask = None
    elif attention_mask is None and cu_seq_lens_q is not None:
        program = _packed(module, query, key, cu_seq_lens_q, cu_seq_lens_k)
    if indices is not None:
        chosen = torch.zeros(query.shape[0], queries, keys, dtype=torch.bool, device=query.device)
        dense = masks.Dense(chosen.scatter(2, indices.long(), True)[:, None])
        program = masks.MaskProgram(dense) if program is None else program & dense
    grouped = key.shape[1] == query.shape[1] or getattr(module, "num_key_value_groups", 1) > 1  # torch's side asks the module
    extras = program is not None or softcap is not None or s_aux is not None or sinks is not None
    if grouped and not extras and _torch_is_faster(query, key, value, dropout):
        return _torch(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias)
    if dropout > 0.0 and torch.compiler.is_compiling():
        raise ValueError(f'{type(module).__name__}: "{NAME}" has no compiled dropout with soft caps, sinks or mask programs; '
                         'use attn_implementation="eager"')
    if causal and keys > queries:
        key, value = key[:, :, :queries], value[:, :, :queries]
        bias = None if bias is None else bias[..., :queries]
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            key_mask, causal, lowered = lower(attention_mask, query.shape[0], queries, keys)
            program = lowered if program is None else program if lowered is None else program & lowered
        else:
            allow = attention_mask[..., :keys]
            bias = allow if bias is None else bias + allow
    dropped = (dropout, int(torch.randint(2**62, ()))) if dropout > 0.0 else None
    options: dict[str, Any] = {"causal": causal, "key_mask": key_mask, "mask": program, "bias": bias, "scale": scaling,
                               "softcap": softcap, "dropout": dropped}
    if s_aux is None and sinks is None:
        out = ops.attention(query, key, value, **options)
    else:
        out, lse = ops.attention(query, key, value, **options, return_lse=True)
        sink = s_aux.to(lse.dtype)[None, :, None] if s_aux is not None else sinks.to(lse.dtype)[..., 0]  # type: ignore[union-attr]
        out = out * torch.sigmoid(lse - sink)[..., None].to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _torch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None,
           is_causal: bool | None, position_bias: Tensor | None) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None:
        mask = mask[..., : key.shape[2]]
        if mask.dtype not in (torch.bool, query.dtype):
            mask = mask.to(query.dtype)
    if position_bias is not None and position_bias.dtype != query.dtype:
        position_bias = position_bias.to(query.dtype)
    out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling,
                                                      is_causal=is_causal, position_bias=position_bias)
    return out


def _torch_is_faster(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> bool:
    """Whether a call without soft cap, sinks or program goes to torch: measured, a call of the operator costs more than the work
    below two million products, ten with a backward pass, and packing keys for fewer than 8 queries is not repaid. Compiled dropout
    is torch's."""
    if dropout > 0.0:
        return torch.compiler.is_compiling()
    if current_backend() != "auto" or query.device.type != "cpu" or torch.compiler.is_exporting():
        return False
    batch, heads, queries, width = query.shape
    least = 10_000_000 if query.requires_grad and torch.is_grad_enabled() else 2_000_000
    return queries < 8 or batch * heads * queries * key.shape[2] * (width + value.shape[3]) < least


def _packed(module: nn.Module, query: Tensor, key: Tensor, bounds: Tensor, of_keys: Tensor | None) -> masks.MaskProgram:
    """Each query sees the keys of its own sequence; bounds [S + 1] of sequences that lie one after the other."""
    same = of_keys is None or of_keys is bounds or torch.equal(of_keys, bounds)
    if query.shape[0] != 1 or query.shape[2] != key.shape[2] or not same:
        raise ValueError(f'{type(module).__name__}: "{NAME}" takes cu_seq_lens for one row whose queries and keys are the same tokens, '
                         f"got queries {tuple(query.shape)} and keys {tuple(key.shape)}")
    at = torch.arange(query.shape[2], device=query.device)
    bounds = bounds.to(at)
    own = torch.searchsorted(bounds, at, right=True)
    return masks.MaskProgram(masks.Rows(torch.stack([bounds[own - 1], bounds[own]], 1)[None]))


def _refuse(module: nn.Module, more: dict[str, Any]) -> None:
    """ValueError if `more` asks for what changes the result and is not served, by its name or because the model's own
    attention function has a parameter for it."""
    known = _own_parameters(type(module)) if more else frozenset()
    for name, given in more.items():
        if given is not None and given is not False and (name in _REFUSED or name in known):
            raise _refusal(module, name)
    if not torch.compiler.is_compiling() and _probabilities_are_collected():
        raise _refusal(module, "output_attentions")


def _refusal(owner: nn.Module, name: str) -> ValueError:
    what = f"{name} ({_REFUSED[name]})" if name in _REFUSED else name
    return ValueError(f'{type(owner).__name__}: "{NAME}" does not serve {what}; use attn_implementation="eager"')


_parameters: dict[type, frozenset[str]] = {}


def _own_parameters(kind: type) -> frozenset[str]:
    """Parameters of the eager attention function beside a module's class that are not served."""
    if kind not in _parameters:
        eager = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        _parameters[kind] = frozenset() if eager is None else frozenset(inspect.signature(eager).parameters) - _SERVED
    return _parameters[kind]


def _probabilities_are_collected() -> bool:
    """Whether the forward pass that runs now was asked for attention probabilities."""
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    wanted: Any = None if collector is None else collector.get()
    return bool(wanted) and any("attentions" in name for name in wanted)
