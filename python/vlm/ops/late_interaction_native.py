"""Native late interaction as torch operators. R x T and C x U tokens of width E; all float32 on the CPU."""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.backend import core

FOUND_LIMIT = 8 * 2**20
"""Most places of maxima (two bytes each) that the forward keeps; beyond, the backward looks for them again."""


def _tokens(t: Tensor, mask: Tensor | None, alive: list[Tensor]) -> tuple[int, int, int, int, int, int]:
    t = t if t.stride(2) == 1 or t.shape[2] <= 1 else t.contiguous()
    alive.append(t)
    address = 0
    if mask is not None and mask.numel():
        mask = mask.contiguous()
        alive.append(mask)
        address = mask.data_ptr()
    return t.data_ptr(), t.shape[0], t.shape[1], t.stride(0), t.stride(1), address


@torch.library.custom_op("vlm::late_interaction", mutates_args=(), device_types="cpu")
def native_late_interaction(v: Tensor, w: Tensor, mask_v: Optional[Tensor], mask_w: Optional[Tensor],  # noqa: UP045
                            mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """v [R, T, E], w [C, U, E], bool masks [R, T] and [C, U] -> rows [R, C], columns [R, C], places for the backward."""
    alive: list[Tensor] = []
    rows, columns, found = _outputs(v, w)
    core().late_forward(_tokens(v, mask_v, alive), _tokens(w, mask_w, alive), v.shape[2], mean, rows.data_ptr(),
                        columns.data_ptr(), found.data_ptr(), torch.get_num_threads())
    return rows, columns, found


def _outputs(v: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    pairs = v.shape[0] * w.shape[0]
    places = pairs * (v.shape[1] + w.shape[1])
    return (v.new_empty(v.shape[0], w.shape[0]), v.new_empty(v.shape[0], w.shape[0]),
            v.new_zeros(places if places <= FOUND_LIMIT else 0, dtype=torch.int16))


@native_late_interaction.register_fake
def _(v: Tensor, w: Tensor, mask_v: Tensor | None, mask_w: Tensor | None, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(v, w)


@torch.library.custom_op("vlm::late_interaction_backward", mutates_args=(), device_types="cpu")
def native_late_interaction_backward(v: Tensor, w: Tensor, mask_v: Optional[Tensor],  # noqa: UP045
                                     mask_w: Optional[Tensor], mean: bool, found: Tensor,  # noqa: UP045
                                     drows: Optional[Tensor],  # noqa: UP045
                                     dcolumns: Optional[Tensor], want_v: bool,  # noqa: UP045
                                     want_w: bool) -> tuple[Tensor, Tensor]:
    """Gradients of v and w, empty unless wanted; a gradient that is None is zero. Has no gradient of its own."""
    alive: list[Tensor] = []
    drows, dcolumns = (None if d is None else d.contiguous() for d in (drows, dcolumns))
    dv, dw = _gradients(v, w, want_v, want_w)
    core().late_backward(_tokens(v, mask_v, alive), _tokens(w, mask_w, alive), v.shape[2], mean,
                         0 if drows is None else drows.data_ptr(), 0 if dcolumns is None else dcolumns.data_ptr(),
                         found.data_ptr(), dv.data_ptr() if want_v else 0, dw.data_ptr() if want_w else 0, torch.get_num_threads())
    return dv, dw


def _gradients(v: Tensor, w: Tensor, want_v: bool, want_w: bool) -> tuple[Tensor, Tensor]:
    return v.new_empty(v.shape if want_v else (0,)), w.new_empty(w.shape if want_w else (0,))


@native_late_interaction_backward.register_fake
def _(v: Tensor, w: Tensor, mask_v: Tensor | None, mask_w: Tensor | None, mean: bool, found: Tensor,
      drows: Tensor | None, dcolumns: Tensor | None, want_v: bool, want_w: bool) -> tuple[Tensor, Tensor]:
    return _gradients(v, w, want_v, want_w)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v, w, mask_v, mask_w, mean = inputs
    ctx.save_for_backward(v, w, mask_v, mask_w, output[2])
    ctx.mean = mean
    ctx.set_materialize_grads(False)  # a direction that the loss does not use costs nothing


def _backward(ctx: Any, drows: Tensor | None, dcolumns: Tensor | None, _found: Tensor | None
              ) -> tuple[Tensor | None, ...]:
    v, w, mask_v, mask_w, found = ctx.saved_tensors
    want_v, want_w = ctx.needs_input_grad[:2]
    dv, dw = native_late_interaction_backward(v, w, mask_v, mask_w, ctx.mean, found, drows, dcolumns, want_v, want_w)
    return dv if want_v else None, dw if want_w else None, None, None, None


native_late_interaction.register_autograd(_backward, setup_context=_save)
