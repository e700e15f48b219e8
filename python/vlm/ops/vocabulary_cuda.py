"""Cross-entropy fused with its linear map on CUDA devices, as torch operators: no buffer of logits exists.

N rows, C width, V ids. All float32; the gradients are always made in the backward pass, from logits computed again.
"""

from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.cuda_core import workspace
from vlm.ops.kernels import Launch, address, launch_on, readable
from vlm.ops.vocabulary_chunks import chosen_rows, spread


def _block(t: Tensor) -> tuple[int, int]:
    return (t.data_ptr(), t.stride(0)) if t.numel() else (0, 0)


def _problem(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
             options: tuple[float, float, float]) -> tuple[dict[str, Any], list[Tensor | None]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    hidden, weight, labels = readable(hidden), readable(weight), labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    arguments: dict[str, Any] = {
        "sizes": (hidden.shape[0], weight.shape[0], hidden.shape[1]), "hidden": (hidden.data_ptr(), hidden.stride(0)),
        "weight": (weight.data_ptr(), weight.stride(0)), "bias": address(bias), "labels": labels.data_ptr(), "options": options,
    }
    return arguments, [hidden, weight, bias, labels]


def _losses(launch: Launch, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor,
            options: tuple[float, float, float]) -> tuple[Tensor, Tensor, Tensor]:
    arguments, _alive = _problem(hidden, weight, bias, labels, options)
    room = workspace(hidden, launch.module.vocabulary_workspace(arguments["sizes"]))
    loss, log_p, lse = (hidden.new_empty(len(hidden)) for _ in range(3))
    launch.module.vocabulary_forward(**arguments, loss=loss.data_ptr(), log_p=log_p.data_ptr(), lse=lse.data_ptr(),
                                     workspace=room.data_ptr(), **launch.place)
    return loss, log_p, lse


@torch.library.custom_op("vlm::linear_cross_entropy_cuda", mutates_args=(), device_types=("cpu", "cuda"))
def cross_entropy_cuda(hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor,  # noqa: UP045
                       factors: Optional[Tensor], smoothing: float, z_loss: float,  # noqa: UP045
                       softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, C], weight [V, C], bias [V], labels int64 [N] (-1: ignored, the row is not read), factors [N]
    -> factors * loss, log_p and lse, each [N], 0 where ignored. Gradients flow through the first alone."""
    rows, chosen = len(hidden), chosen_rows(labels)
    if chosen is not None:
        hidden, labels = hidden[chosen], labels[chosen]
    with launch_on(hidden) as launch:
        found = _losses(launch, hidden, weight, bias, labels, (smoothing, z_loss, softcap))
    loss, log_p, lse = (spread(column, chosen, rows) for column in found)
    if factors is not None:  # what an ignored row's factor is does not matter, not even NaN
        loss = loss * factors if chosen is None else spread(found[0] * factors[chosen], chosen, rows)
    return loss, log_p, lse


@cross_entropy_cuda.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, smoothing: float, z_loss: float,
      softcap: float) -> tuple[Tensor, Tensor, Tensor]:
    return hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))


@torch.library.custom_op("vlm::linear_cross_entropy_cuda_backward", mutates_args=(), device_types=("cpu", "cuda"))
def cross_entropy_cuda_backward(hidden: Tensor, weight: Tensor, bias: Optional[Tensor], labels: Tensor,  # noqa: UP045
                                factors: Optional[Tensor], lse: Tensor, upstream: Tensor, smoothing: float,  # noqa: UP045
                                z_loss: float, softcap: float, want_hidden: bool, want_weight: bool,
                                want_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, empty where not wanted. Has no gradient of its own."""
    rows, chosen = len(hidden), chosen_rows(labels)
    dweight, dbias = _outputs(hidden, weight, bias, False, want_weight, want_bias)[1:]
    if chosen is not None:
        hidden, labels, lse, upstream = hidden[chosen], labels[chosen], lse[chosen], upstream[chosen]
        factors = None if factors is None else factors[chosen]
    total = (upstream if factors is None else upstream * factors).contiguous()
    dhidden = hidden.new_empty(hidden.shape if want_hidden else (0,))
    lse = lse.contiguous()
    with launch_on(hidden) as launch:
        arguments, _alive = _problem(hidden, weight, bias, labels, (smoothing, z_loss, softcap))
        launch.module.vocabulary_backward(**arguments, lse=lse.data_ptr(), factors=total.data_ptr(), dhidden=_block(dhidden),
                                          dweight=_block(dweight), dbias=dbias.data_ptr() if dbias.numel() else 0, **launch.place)
    return spread(dhidden, chosen, rows) if want_hidden else dhidden, dweight, dbias


def _outputs(hidden: Tensor, weight: Tensor, bias: Tensor | None, want_hidden: bool, want_weight: bool,
             want_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return (hidden.new_empty(hidden.shape if want_hidden else (0,)), weight.new_empty(weight.shape if want_weight else (0,)),
            weight.new_empty(bias.shape if want_bias and bias is not None else (0,)))


@cross_entropy_cuda_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factors: Tensor | None, lse: Tensor, upstream: Tensor,
      smoothing: float, z_loss: float, softcap: float, want_hidden: bool, want_weight: bool,
      want_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(hidden, weight, bias, want_hidden, want_weight, want_bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, factors, *options = inputs
    ctx.save_for_backward(hidden, weight, bias, labels, factors, output[2])
    ctx.options = tuple(options)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, upstream: Tensor | None, *_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if upstream is None:
        return (None,) * 8
    want = tuple(bool(w) for w in ctx.needs_input_grad[:3])
    gradients = cross_entropy_cuda_backward(*ctx.saved_tensors, upstream, *ctx.options, *want)
    return (*(g if w else None for g, w in zip(gradients, want)), *(None,) * 5)


cross_entropy_cuda.register_autograd(_backward, setup_context=_save)
