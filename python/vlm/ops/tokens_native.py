"""Native token reduction as torch operators. B batch, N tokens, K kept ones or slots, C width. On the CPU and on GPUs."""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.cuda_core import workspace
from vlm.ops.kernels import address, launch_on, readable


@torch.library.custom_op("vlm::bipartite_match", mutates_args=(), device_types=("cpu", "cuda"))
def native_match(metric: Tensor, r: int, protect: int, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """metric float32 [B, N, D] or [B, H, N, D] -> source, target [B, r], kept [B, N - r], assign [B, N], int64."""
    metric = readable(metric)
    heads = metric.shape[1] if metric.ndim == 4 else 1
    batch, length, width = metric.shape[0], metric.shape[-2], metric.shape[-1]
    strides = (metric.stride(0), metric.stride(1) if metric.ndim == 4 else 0, metric.stride(-2))
    sizes, outputs = (batch, heads, length, width), _match_outputs(metric, r)
    source, target, kept, assign = (t.data_ptr() for t in outputs)
    with launch_on(metric) as launch:
        place, room = launch.place, None
        if launch.cuda:
            room = workspace(metric, launch.module.token_match_workspace(sizes))
            place = {"workspace": room.data_ptr(), **place}
        launch.module.token_match(sizes=sizes, metric=metric.data_ptr(), strides=strides, merged=r, protect=protect, order=order,
                                  source=source, target=target, kept=kept, assign=assign, **place)
    return outputs


def _match_outputs(metric: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length = metric.shape[0], metric.shape[-2]

    def empty(n: Any) -> Tensor:
        return metric.new_empty((batch, n), dtype=torch.int64)

    return empty(r), empty(r), empty(length - r), empty(length)


@native_match.register_fake
def _(metric: Tensor, r: int, protect: int, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _match_outputs(metric, r)


@torch.library.custom_op("vlm::select_top", mutates_args=(), device_types=("cpu", "cuda"))
def native_select(scores: Tensor, counts: Tensor, valid: Optional[Tensor],  # noqa: UP045
                  always: Optional[Tensor]) -> tuple[Tensor, Tensor]:  # noqa: UP045
    """scores float32 [B, N], counts int64 [B], valid and always bool [B, N] -> index [B, N] ascending, then -1, and
    how many [B]."""
    scores, counts = scores.contiguous(), counts.contiguous()
    valid = None if valid is None else valid.contiguous()
    always = None if always is None else always.contiguous()
    index, found = _select_outputs(scores)
    with launch_on(scores) as launch:
        launch.module.token_select(batch=scores.shape[0], length=scores.shape[1], scores=scores.data_ptr(), counts=counts.data_ptr(),
                                   valid=address(valid), always=address(always), index=index.data_ptr(), found=found.data_ptr(),
                                   **launch.place)
    return index, found


def _select_outputs(scores: Tensor) -> tuple[Tensor, Tensor]:
    return scores.new_empty(scores.shape, dtype=torch.int64), scores.new_empty(scores.shape[0], dtype=torch.int64)


@native_select.register_fake
def _(scores: Tensor, counts: Tensor, valid: Tensor | None, always: Tensor | None) -> tuple[Tensor, Tensor]:
    return _select_outputs(scores)


@torch.library.custom_op("vlm::merge_weights", mutates_args=(), device_types=("cpu", "cuda"))
def native_merge_weights(assign: Tensor, sizes: Optional[Tensor], slots: int, by_size: bool) -> tuple[Tensor, Tensor]:  # noqa: UP045
    """assign [B, N], sizes float32 [B, N] -> weights float32 [B, N] and the sizes of the slots [B, K]."""
    assign, sizes = assign.contiguous(), None if sizes is None else sizes.contiguous()
    weights, totals = _weight_outputs(assign, slots)
    with launch_on(assign) as launch:
        launch.module.token_weights(sizes=(*assign.shape, slots), assign=assign.data_ptr(), by_size=by_size, token_sizes=address(sizes),
                                    weights=weights.data_ptr(), slot_sizes=totals.data_ptr(), **launch.place)
    return weights, totals


def _weight_outputs(assign: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    return (assign.new_empty(assign.shape, dtype=torch.float32),
            assign.new_empty((assign.shape[0], slots), dtype=torch.float32))


@native_merge_weights.register_fake
def _(assign: Tensor, sizes: Tensor | None, slots: int, by_size: bool) -> tuple[Tensor, Tensor]:
    return _weight_outputs(assign, slots)


@torch.library.custom_op("vlm::scatter_rows", mutates_args=(), device_types=("cpu", "cuda"))
def native_scatter(x: Tensor, index: Tensor, weights: Optional[Tensor], slots: int) -> Tensor:  # noqa: UP045
    """x float32 [B, N, C], index int64 [B, N] in -1 .. slots - 1, weights float32 [B, N]
    -> the weighted sum of the rows of every slot [B, slots, C]."""
    x, index, weights = readable(x), index.contiguous(), None if weights is None else weights.contiguous()
    out = x.new_empty((x.shape[0], slots, x.shape[2]))
    with launch_on(x) as launch:
        launch.module.token_scatter(sizes=(x.shape[0], x.shape[1], slots, x.shape[2]), from_=x.data_ptr(), batch_stride=x.stride(0),
                                    row_stride=x.stride(1), index=index.data_ptr(), to=out.data_ptr(), weights=address(weights),
                                    **launch.place)
    return out


@native_scatter.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor | None, slots: int) -> Tensor:
    return x.new_empty((x.shape[0], slots, x.shape[2]))


@torch.library.custom_op("vlm::gather_rows", mutates_args=(), device_types=("cpu", "cuda"))
def native_gather(x: Tensor, index: Tensor, weights: Optional[Tensor]) -> Tensor:  # noqa: UP045
    """x [B, K, C] (any type without weights, else float32), index int64 [B, N] in -1 .. K - 1 -> [B, N, C]."""
    x, index, weights = readable(x), index.contiguous(), None if weights is None else weights.contiguous()
    out = x.new_empty((x.shape[0], index.shape[1], x.shape[2]))
    with launch_on(x) as launch:
        launch.module.token_gather(sizes=(x.shape[0], x.shape[1], index.shape[1], x.shape[2]), from_=x.data_ptr(),
                                   batch_stride=x.stride(0), row_stride=x.stride(1), element_bytes=x.element_size(),
                                   index=index.data_ptr(), weights=address(weights), to=out.data_ptr(), **launch.place)
    return out


@native_gather.register_fake
def _(x: Tensor, index: Tensor, weights: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], index.shape[1], x.shape[2]))


def _save_scatter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, index, weights, _ = inputs
    ctx.save_for_backward(index, weights)


def _scatter_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    index, weights = ctx.saved_tensors
    return native_gather(gradient, index, weights), None, None, None


def _save_gather(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, index, weights = inputs
    ctx.length = x.shape[1]
    ctx.save_for_backward(index, weights)


def _gather_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    index, weights = ctx.saved_tensors
    return native_scatter(gradient.float(), index, weights, ctx.length).to(gradient.dtype), None, None


native_scatter.register_autograd(_scatter_backward, setup_context=_save_scatter)
native_gather.register_autograd(_gather_backward, setup_context=_save_gather)
