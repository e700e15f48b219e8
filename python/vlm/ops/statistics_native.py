"""Native statistics of the attention matrix as torch operators; nothing here has a gradient.

B batch, H query heads, G key heads, N queries, M keys, D width, R chosen rows. All float32 on the CPU.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core


def _readable(t: Tensor) -> Tensor:
    """The same values with a contiguous last axis."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _view(t: Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _problem(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
             causal_offset: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by the kernels, and the tensors whose memory they point to."""
    q, k = _readable(q), _readable(k)
    alive = [q, k]
    arguments: dict[str, Any] = {
        "sizes": (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]), "q": _view(q), "k": _view(k),
        "scale": scale, "causal": causal, "causal_offset": causal_offset, "key_mask": 0, "key_mask_stride": 0,
        "bias": (0, 0, 0, 0), "threads": torch.get_num_threads(),
    }
    if key_mask is not None:
        key_mask = _readable(key_mask)
        alive.append(key_mask)
        arguments |= {"key_mask": key_mask.data_ptr(), "key_mask_stride": key_mask.stride(0)}
    if bias is not None:
        bias = _readable(bias).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        bias = _readable(bias)  # one number for all keys becomes a row
        alive.append(bias)
        arguments["bias"] = _view(bias)
    return arguments, alive


@torch.library.custom_op("vlm::attention_row_statistics", mutates_args=(), device_types="cpu")
def native_row_statistics(q: Tensor, k: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                          scale: float, causal: bool, causal_offset: int,
                          everything: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> lse, entropy [B, H, N] float32 and the best key [B, H, N] int64; the last two are empty unless `everything`."""
    arguments, _alive = _problem(q, k, key_mask, bias, scale, causal, causal_offset)
    lse, entropy, best = _row_outputs(q, everything)
    core().attention_row_statistics(**arguments, lse=lse.data_ptr(), entropy=entropy.data_ptr() if everything else 0,
                                    best=best.data_ptr() if everything else 0)
    return lse, entropy, best


def _row_outputs(q: Tensor, everything: bool) -> tuple[Tensor, Tensor, Tensor]:
    extra = q.shape[:3] if everything else (0,)
    return q.new_empty(q.shape[:3]), q.new_empty(extra), q.new_empty(extra, dtype=torch.int64)


@native_row_statistics.register_fake
def _(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
      causal_offset: int, everything: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _row_outputs(q, everything)


@torch.library.custom_op("vlm::attention_column_sums", mutates_args=(), device_types="cpu")
def native_column_sums(q: Tensor, k: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                       scale: float, causal: bool, causal_offset: int, lse: Tensor,
                       weights: Optional[Tensor]) -> Tensor:  # noqa: UP045
    """lse and weights [B, H, N] -> sum_i weights_i P_ij [B, H, M]."""
    arguments, _alive = _problem(q, k, key_mask, bias, scale, causal, causal_offset)
    lse, weights = lse.contiguous(), None if weights is None else weights.contiguous()
    sums = q.new_empty((q.shape[0], q.shape[1], k.shape[2]))
    core().attention_column_sums(**arguments, lse=lse.data_ptr(), sums=sums.data_ptr(),
                                 weights=0 if weights is None else weights.data_ptr())
    return sums


@native_column_sums.register_fake
def _(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
      causal_offset: int, lse: Tensor, weights: Tensor | None) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]))


@torch.library.custom_op("vlm::attention_rows", mutates_args=(), device_types="cpu")
def native_rows(q: Tensor, k: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                scale: float, causal: bool, causal_offset: int, rows: Tensor) -> Tensor:
    """rows int64 [B, R], -1 for none -> P [B, H, R, M]."""
    arguments, _alive = _problem(q, k, key_mask, bias, scale, causal, causal_offset)
    rows = rows.contiguous()
    out = q.new_empty((q.shape[0], q.shape[1], rows.shape[1], k.shape[2]))
    core().attention_rows(**arguments, count=rows.shape[1], rows=rows.data_ptr(), probabilities=out.data_ptr())
    return out


@native_rows.register_fake
def _(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool,
      causal_offset: int, rows: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], rows.shape[1], k.shape[2]))
