"""Masks between transformers and the operator: what models are given, and how masks are read back into programs.

B batch, H heads, N queries, M keys.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlm.ops import masks

Lowered = tuple[Tensor | None, bool, masks.MaskProgram | None]
"""(key mask [B, M], causal, other atoms)."""


def native_mask(*, allow_is_causal_skip: bool = True, allow_is_bidirectional_skip: bool = False, **options: Any) -> Tensor | None:
    """transformers' boolean mask [B, 1, N, M]; None only where it is the causal one, which needs no tensor.

    Without a mask attention goes by the flag of the module. So a model whose modules say that they read both ways gets its causal mask
    written out (PaliGemma without token types), and where queries see every key the mask is one stored value, expanded.
    """
    from transformers.masking_utils import sdpa_mask

    both_ways = bool(getattr(options.get("config"), "use_bidirectional_attention", None))
    wanted = allow_is_causal_skip
    allow_is_causal_skip = wanted and not both_ways
    mask: Tensor | None = sdpa_mask(**options, allow_is_causal_skip=allow_is_causal_skip,
                                    allow_is_bidirectional_skip=allow_is_bidirectional_skip)
    if mask is None and not wanted:
        one = torch.ones((), dtype=torch.bool, device=options.get("device", "cpu"))
        mask = one.expand(options["batch_size"], 1, options["q_length"], options["kv_length"])
    return mask


def hides_nothing(mask: Tensor) -> bool:
    """Whether a boolean mask is the one of `native_mask` for queries that see every key."""
    return _visible(mask) and not any(mask.stride()) and bool(mask[0, 0, 0, 0])


def lower(mask: Tensor, batch: int, queries: int, keys: int) -> Lowered:
    """A boolean mask [B | 1, H | 1, N | 1, >= M] as what the operator takes. What was read is kept with the tensor, since every layer
    of a model is given the same one; a mask that was written to since is read anew."""
    allow = mask[..., :keys]
    if not _visible(allow):
        return None, False, masks.MaskProgram(masks.Dense(allow))
    key = None if mask.is_inference() else (mask._version, batch, queries, keys)
    kept = getattr(mask, "_vlm_lowered", None)
    if kept is None or key is None or kept[0] != key:
        kept = key, _read(allow, batch, queries)
        if key is not None:
            mask._vlm_lowered = kept  # type: ignore[attr-defined]
    found: Lowered | None = kept[1]
    return (None, False, masks.MaskProgram(masks.Dense(allow))) if found is None else found


def _read(allow: Tensor, batch: int, queries: int) -> Lowered | None:
    """None where the mask has to stay as it is. The result shares no storage with `allow`, or neither could be freed."""
    plain = _plain_form(allow, queries)
    if plain is not None:
        return None if bool(plain[0].all()) else plain[0].clone().expand(batch, -1), plain[1], None
    ranges = _ranges_form(allow)
    if ranges is None:
        return None
    rows, keys = ranges
    return None if keys is None else keys.expand(batch, -1), False, masks.MaskProgram(masks.Rows(rows))


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
