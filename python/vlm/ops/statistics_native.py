"""Native statistics of the attention matrix as torch operators; nothing here has a gradient.

B batch, H query heads, G key heads, N queries, M keys, D width, R chosen rows. All float32, on the CPU; column sums and log-sum-exps
on a GPU, too. Shared arguments: bias
[B|1, H|1, N|1, M|1]; relative [H|1, L] with grid_rows and grid_columns (0 for a line), see `vlm.ops.attention_bias.Relative`;
arrays, dense and code of `vlm.ops.masks.LoweredMask`; softcap, 0 for none.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.attention_native import NO_VIEW, add_mask_and_bias, attention_room
from vlm.ops.backend import core
from vlm.ops.kernels import launch_on, readable, view


def _problem(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, relative: Tensor | None,
             arrays: Tensor | None, dense: Tensor | None, code: Sequence[int] | None, scale: float, causal: bool,
             causal_offset: int, grid_rows: int, grid_columns: int, softcap: float) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by the kernels, and the tensors whose memory they point to."""
    q, k = readable(q), readable(k)
    alive = [q, k]
    arguments: dict[str, Any] = {
        "sizes": (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], 0),
        "q": view(q), "k": view(k), "scale": scale, "causal": causal, "causal_offset": causal_offset,
    }
    extras = add_mask_and_bias(arguments, alive, key_mask, bias, relative, arrays, dense, code, grid_rows, grid_columns, softcap)
    if extras:
        arguments["extras"] = extras
    return arguments, alive


@torch.library.custom_op("vlm::attention_row_statistics", mutates_args=(), device_types=("cpu", "cuda"))
def native_row_statistics(q: Tensor, k: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                          relative: Optional[Tensor], arrays: Optional[Tensor], dense: Optional[Tensor],  # noqa: UP045
                          code: Optional[Sequence[int]], scale: float, causal: bool, causal_offset: int, grid_rows: int,  # noqa: UP045
                          grid_columns: int, softcap: float, everything: bool) -> tuple[Tensor, Tensor, Tensor]:
    """-> lse, entropy [B, H, N] float32 and the best key [B, H, N] int64; the last two are empty unless `everything`, which is
    for the CPU."""
    arguments, _alive = _problem(q, k, key_mask, bias, relative, arrays, dense, code, scale, causal, causal_offset,
                                 grid_rows, grid_columns, softcap)
    lse, entropy, best = _row_outputs(q, everything)
    with launch_on(q) as launch:
        if launch.cuda:  # attention to values of width 0; the other two are not asked for
            _alive_too, place = attention_room(launch, q, arguments, False)
            launch.module.attention_forward(**arguments, v=NO_VIEW, out=NO_VIEW, lse=lse.data_ptr(), **place)
        else:
            launch.module.attention_row_statistics(**arguments, lse=lse.data_ptr(), entropy=entropy.data_ptr() if everything else 0,
                                                   best=best.data_ptr() if everything else 0, **launch.place)
    return lse, entropy, best


def _row_outputs(q: Tensor, everything: bool) -> tuple[Tensor, Tensor, Tensor]:
    extra = q.shape[:3] if everything else (0,)
    return q.new_empty(q.shape[:3]), q.new_empty(extra), q.new_empty(extra, dtype=torch.int64)


@native_row_statistics.register_fake
def _(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, relative: Tensor | None, arrays: Tensor | None,
      dense: Tensor | None, code: Sequence[int] | None, scale: float, causal: bool, causal_offset: int, grid_rows: int,
      grid_columns: int, softcap: float, everything: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _row_outputs(q, everything)


@torch.library.custom_op("vlm::attention_column_sums", mutates_args=(), device_types=("cpu", "cuda"))
def native_column_sums(q: Tensor, k: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                       relative: Optional[Tensor], arrays: Optional[Tensor], dense: Optional[Tensor],  # noqa: UP045
                       code: Optional[Sequence[int]], scale: float, causal: bool, causal_offset: int, grid_rows: int,  # noqa: UP045
                       grid_columns: int, softcap: float, lse: Tensor,
                       weights: Optional[Tensor]) -> Tensor:  # noqa: UP045
    """lse and weights [B, H, N] -> sum_i weights_i P_ij [B, H, M]."""
    arguments, _alive = _problem(q, k, key_mask, bias, relative, arrays, dense, code, scale, causal, causal_offset,
                                 grid_rows, grid_columns, softcap)
    lse, weights = lse.contiguous(), None if weights is None else weights.contiguous()
    sums = q.new_empty((q.shape[0], q.shape[1], k.shape[2]))
    with launch_on(q) as launch:
        _alive_too, place = attention_room(launch, q, arguments, False)
        launch.module.attention_column_sums(**arguments, lse=lse.data_ptr(), sums=sums.data_ptr(),
                                            weights=0 if weights is None else weights.data_ptr(), **place)
    return sums


@native_column_sums.register_fake
def _(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, relative: Tensor | None, arrays: Tensor | None,
      dense: Tensor | None, code: Sequence[int] | None, scale: float, causal: bool, causal_offset: int, grid_rows: int,
      grid_columns: int, softcap: float, lse: Tensor, weights: Tensor | None) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], k.shape[2]))


@torch.library.custom_op("vlm::attention_rows", mutates_args=(), device_types="cpu")
def native_rows(q: Tensor, k: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
                relative: Optional[Tensor], arrays: Optional[Tensor], dense: Optional[Tensor],  # noqa: UP045
                code: Optional[Sequence[int]], scale: float, causal: bool, causal_offset: int, grid_rows: int,  # noqa: UP045
                grid_columns: int, softcap: float, rows: Tensor) -> Tensor:
    """rows int64 [B, R], -1 for none -> P [B, H, R, M]."""
    arguments, _alive = _problem(q, k, key_mask, bias, relative, arrays, dense, code, scale, causal, causal_offset,
                                 grid_rows, grid_columns, softcap)
    rows = rows.contiguous()
    out = q.new_empty((q.shape[0], q.shape[1], rows.shape[1], k.shape[2]))
    core().attention_rows(**arguments, threads=torch.get_num_threads(), count=rows.shape[1], rows=rows.data_ptr(),
                          probabilities=out.data_ptr())
    return out


@native_rows.register_fake
def _(q: Tensor, k: Tensor, key_mask: Tensor | None, bias: Tensor | None, relative: Tensor | None, arrays: Tensor | None,
      dense: Tensor | None, code: Sequence[int] | None, scale: float, causal: bool, causal_offset: int, grid_rows: int,
      grid_columns: int, softcap: float, rows: Tensor) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], rows.shape[1], k.shape[2]))
