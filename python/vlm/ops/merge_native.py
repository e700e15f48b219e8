"""The native merge of attention results over disjoint keys, with its gradient. All float32 on the CPU."""

from typing import Any

import torch
from torch import Tensor

from vlm.ops.backend import core


def _readable(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()


def _view(t: Tensor) -> tuple[int, int, int, int]:
    return (t.data_ptr(), t.stride(0), t.stride(1), t.stride(2))


def _heads_inside(like: Tensor) -> Tensor:
    """An empty tensor [B, H, N, V] that lies as [B, N, H, V], as attention leaves its output."""
    b, h, n, v = like.shape
    return like.new_empty((b, n, h, v)).transpose(1, 2)


@torch.library.custom_op("vlm::merge_attention", mutates_args=(), device_types="cpu")
def native_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """outs [P] of [B, H, N, V], lses [P] of [B, H, N] -> out, lse."""
    outs, lses = [_readable(t) for t in outs], [t.contiguous() for t in lses]
    out, lse = _heads_inside(outs[0]), torch.empty_like(lses[0])
    core().attention_merge(sizes=tuple(out.shape), parts=[(_view(o), s.data_ptr()) for o, s in zip(outs, lses)],
                           out=_view(out), lse=lse.data_ptr(), threads=torch.get_num_threads())
    return out, lse


@native_merge.register_fake
def _(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _heads_inside(outs[0]), lses[0].new_empty(lses[0].shape)


@torch.library.custom_op("vlm::merge_attention_backward", mutates_args=(), device_types="cpu")
def native_merge_backward(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, dout: Tensor,
                          dlse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of all parts. Has no gradient of its own."""
    outs, lses = [_readable(t) for t in outs], [t.contiguous() for t in lses]
    out, lse, dout, dlse = _readable(out), lse.contiguous(), _readable(dout), dlse.contiguous()
    douts, dlses = [_heads_inside(o) for o in outs], [torch.empty_like(s) for s in lses]
    core().attention_merge_backward(
        sizes=tuple(out.shape), parts=[(_view(o), s.data_ptr()) for o, s in zip(outs, lses)], out=_view(out),
        lse=lse.data_ptr(), dout=_view(dout), dlse=dlse.data_ptr(),
        gradients=[(_view(o), s.data_ptr()) for o, s in zip(douts, dlses)], threads=torch.get_num_threads())
    return douts, dlses


@native_merge_backward.register_fake
def _(outs: list[Tensor], lses: list[Tensor], out: Tensor, lse: Tensor, dout: Tensor,
      dlse: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    return [_heads_inside(o) for o in outs], [s.new_empty(s.shape) for s in lses]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.parts = len(outs)
    ctx.save_for_backward(*outs, *lses, *output)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    saved = ctx.saved_tensors
    outs, lses, (out, lse) = list(saved[:ctx.parts]), list(saved[ctx.parts:-2]), saved[-2:]
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    return native_merge_backward(outs, lses, out, lse, dout, dlse)


native_merge.register_autograd(_backward, setup_context=_save)
