"""The native exact attention as torch operators: shapes for the compiler, gradients, addresses for the kernels.

B batch, H query heads, G key/value heads, N queries, M keys, D query/key width, V value width. q, k, v, out and their
gradients float32 or bfloat16, everything else float32. bfloat16 is read and multiplied as it is where the level in force,
or the kernels of the GPU, do that, and converted otherwise.
Results are laid out as [B, N, H, V] in memory and returned as [B, H, N, V], so that merging the heads is free.
"""

from collections.abc import Sequence
from typing import Any, Optional

import torch
from torch import Tensor

from vlm.ops.attention_random import drop_below
from vlm.ops.cuda_core import block_fits, workspace
from vlm.ops.kernels import Launch, launch_on, readable, view
from vlm.ops.masks import LoweredMask

NO_VIEW = (0, 0, 0, 0)
_CUDA_ATOMS = 8
_CUDA_BFLOAT16_WIDTH = 128


def cuda_attends(q: Tensor, value_width: int, mask_atoms: int, extras: bool = False) -> bool:
    """Whether the CUDA kernels compute attention, or its column sums (value_width 0), of tensors that they serve.

    extras: whether there is a soft cap, a temperature or dropout. Tables on a grid are written out before, see `lowered`.
    """
    if extras or mask_atoms > _CUDA_ATOMS or max(q.shape[3], value_width) > 256:
        return False
    return block_fits("attention_shared_bytes", (1, 1, 1, 1, 1, q.shape[3], value_width), q.device.index or 0)


def _heads_inside(like: Tensor, batch: int, heads: int, length: int, width: int) -> Tensor:
    return like.new_empty((batch, length, heads, width)).transpose(1, 2)


def _storage(launch: Launch, q: Tensor, v: Tensor, temperature: Tensor | None, bias_gradient: bool = False) -> torch.dtype:
    """The type in which the kernels read q, k and v. The cosine score would round unit vectors: it is always float32. On a
    GPU wide heads are float32 too, and the gradient of a bias is made from float32."""
    if q.dtype != torch.bfloat16 or temperature is not None:
        return torch.float32
    if launch.cuda:
        keeps = not bias_gradient and max(q.shape[3], v.shape[3]) <= _CUDA_BFLOAT16_WIDTH
    else:
        keeps = launch.module.multiplies_bfloat16()
    return torch.bfloat16 if keeps else torch.float32


def _laid(launch: Launch, t: Tensor) -> Tensor:
    """As the kernels read it: with a contiguous last axis; bfloat16 on a GPU in rows that begin at multiples of 16 bytes."""
    t = readable(t)
    if not launch.cuda or t.dtype != torch.bfloat16 or (t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in t.stride()[:3])):
        return t
    room = t.new_empty((*t.shape[:3], -(-t.shape[3] // 8) * 8))[..., : t.shape[3]]
    room.copy_(t)
    return room


def attention_room(launch: Launch, q: Tensor, arguments: dict[str, Any], backward: bool) -> tuple[Tensor | None, dict[str, int]]:
    """The workspace that a GPU wants, and where to compute."""
    if not launch.cuda:
        return None, launch.place
    sizes = launch.module.attention_workspace(arguments["sizes"], arguments.get("extras", {}).get("atoms", []))
    room = workspace(q, sizes[backward])
    return room, {"workspace": room.data_ptr(), **launch.place}


def _step(t: Tensor, axis: int) -> int:
    """Stride of an axis of extent 1 or full: 0 where it is shared."""
    return t.stride(axis) if t.shape[axis] != 1 else 0


_DENSE = 9


def _atoms(code: Sequence[int], arrays: Tensor | None, dense: Tensor | None) -> list[tuple[int, ...]]:
    """Mask atoms as the core reads them, from `MaskProgram.lower`: places become addresses."""
    base = 0 if arrays is None else arrays.data_ptr()
    atoms = []
    for at in range(0, len(code), 12):
        row = list(code[at : at + 12])
        row[5] = base + 4 * row[5]
        row[9] = base + 4 * row[9]
        atoms.append(tuple(row))
    if dense is not None:
        atoms.append((_DENSE, 0, 0, 0, 0, dense.data_ptr(), _step(dense, 0), _step(dense, 1), dense.stride(2), 0, 0, 0))
    return atoms


def add_mask_and_bias(arguments: dict[str, Any], alive: list[Tensor], key_mask: Tensor | None, bias: Tensor | None,
                      relative: Tensor | None, arrays: Tensor | None, dense: Tensor | None, code: Sequence[int] | None,
                      grid_rows: int, grid_columns: int, softcap: float) -> dict[str, Any]:
    """Adds the mask of keys and the bias to the arguments of a problem, and to `alive` what they point to -> its extras."""
    arguments |= {"key_mask": 0, "key_mask_stride": 0, "bias": NO_VIEW}
    if key_mask is not None:
        key_mask = readable(key_mask)
        alive.append(key_mask)
        arguments |= {"key_mask": key_mask.data_ptr(), "key_mask_stride": key_mask.stride(0)}
    if bias is not None:
        batch, heads, _, queries, keys = arguments["sizes"][:5]
        bias = readable(readable(bias).expand(batch, heads, queries, keys))  # one number for all keys becomes a row
        alive.append(bias)
        arguments["bias"] = view(bias)
    extras: dict[str, Any] = {}
    if code or dense is not None:
        extras["atoms"] = _atoms(code or (), arrays, dense)
    if relative is not None:
        relative = relative.contiguous()
        alive.append(relative)
        extras["relative"] = (relative.data_ptr(), _step(relative, 0), grid_rows, grid_columns)
    if softcap:
        extras["softcap"] = softcap
    return extras


def _problem(launch: Launch, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float,
             causal: bool, causal_offset: int, relative: Tensor | None, temperature: Tensor | None,
             arrays: Tensor | None, dense: Tensor | None, code: Sequence[int] | None, grid_rows: int, grid_columns: int, softcap: float,
             dropout: float, seed: int) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments shared by both kernels, and the tensors whose memory they point to."""
    q, k, v = _laid(launch, q), _laid(launch, k), _laid(launch, v)
    alive = [q, k, v]
    arguments: dict[str, Any] = {
        "sizes": (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]),
        "q": view(q), "k": view(k), "v": view(v), "scale": scale, "causal": causal,
        "causal_offset": causal_offset,
    }
    extras = add_mask_and_bias(arguments, alive, key_mask, bias, relative, arrays, dense, code, grid_rows, grid_columns, softcap)
    if temperature is not None:
        temperature = temperature.contiguous()
        alive.append(temperature)
        extras["temperature"] = (temperature.data_ptr(), _step(temperature, 0))
    if dropout:
        extras |= {"dropout": dropout, "drop_below": drop_below(dropout), "seed": seed}
    if q.dtype == torch.bfloat16:
        extras["half"] = True
    if extras:
        arguments["extras"] = extras
    return arguments, alive


@torch.library.custom_op("vlm::attention", mutates_args=(), device_types=("cpu", "cuda"))
def _attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor], bias: Optional[Tensor],  # noqa: UP045
               relative: Optional[Tensor], temperature: Optional[Tensor], arrays: Optional[Tensor],  # noqa: UP045
               dense: Optional[Tensor], code: Optional[Sequence[int]], scale: float, causal: bool, causal_offset: int,  # noqa: UP045
               grid_rows: int, grid_columns: int, softcap: float, dropout: float, seed: int) -> tuple[Tensor, Tensor]:
    dtype = q.dtype
    with launch_on(q) as launch:
        storage = _storage(launch, q, v, temperature)
        q, k, v = (t.to(storage) for t in (q, k, v))
        arguments, _alive = _problem(launch, q, k, v, key_mask, bias, scale, causal, causal_offset, relative, temperature, arrays,
                                     dense, code, grid_rows, grid_columns, softcap, dropout, seed)
        _alive_too, place = attention_room(launch, q, arguments, False)
        out = _heads_inside(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        launch.module.attention_forward(**arguments, out=view(out), lse=lse.data_ptr(), **place)
        return out.to(dtype), lse


def native_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, scale: float,
                     causal: bool, causal_offset: int, *, relative: Tensor | None = None, grid: tuple[int, int] = (0, 0),
                     temperature: Tensor | None = None,
                     mask: LoweredMask | None = None, softcap: float = 0.0, dropout: float = 0.0,
                     seed: int = 0) -> tuple[Tensor, Tensor]:
    """q [B, H, N, D], k [B, G, M, D], v [B, G, M, V], key_mask bool [B, M], bias [B|1, H|1, N|1, M]
    -> out [B, H, N, V], lse [B, H, N].

    relative [H|1, L] with grid (rows, columns), (0, 0) for a line: see `vlm.ops.attention_bias.Relative`. temperature
    [H|1]: the cosine score, None for plain products. mask: what `MaskProgram.lower` gives. softcap 0 and dropout 0 are none.
    """
    code, arrays, dense = (None, None, None) if mask is None else mask
    return _attention(q, k, v, key_mask, bias, relative, temperature, arrays, dense, code or None, scale, causal, causal_offset, *grid,
                      softcap, dropout, seed)


@_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_rest: object) -> tuple[Tensor, Tensor]:
    return (_heads_inside(q, q.shape[0], q.shape[1], q.shape[2], v.shape[3]),
            q.new_empty(q.shape[:3], dtype=torch.float32))


@torch.library.custom_op("vlm::attention_backward", mutates_args=(), device_types=("cpu", "cuda"))
def native_attention_backward(q: Tensor, k: Tensor, v: Tensor, key_mask: Optional[Tensor],  # noqa: UP045
                              bias: Optional[Tensor], relative: Optional[Tensor],  # noqa: UP045
                              temperature: Optional[Tensor],  # noqa: UP045
                              arrays: Optional[Tensor], dense: Optional[Tensor], code: Optional[Sequence[int]],  # noqa: UP045
                              scale: float, causal: bool, causal_offset: int, grid_rows: int, grid_columns: int,
                              softcap: float, dropout: float, seed: int, out: Tensor, lse: Tensor, dout: Tensor,
                              dlse: Tensor, want_bias: bool, want_relative: bool,
                              want_temperature: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias, relative and temperature (empty unless wanted). Has no gradient of its own."""
    dtype, wanted = q.dtype, want_bias and bias is not None
    with launch_on(q) as launch:
        storage = _storage(launch, q, v, temperature, wanted or want_relative)
        q, k, v, out, dout = (t.to(storage) for t in (q, k, v, out, dout))
        arguments, _alive = _problem(launch, q, k, v, key_mask, bias, scale, causal, causal_offset, relative, temperature, arrays,
                                     dense, code, grid_rows, grid_columns, softcap, dropout, seed)
        _alive_too, place = attention_room(launch, q, arguments, True)
        out, dout, lse, dlse = readable(out), _laid(launch, dout), lse.contiguous(), dlse.contiguous()
        dq = _heads_inside(q, q.shape[0], q.shape[1], q.shape[2], q.shape[3])
        dk = _heads_inside(k, k.shape[0], k.shape[1], k.shape[2], k.shape[3])
        dv = _heads_inside(v, v.shape[0], v.shape[1], v.shape[2], v.shape[3])
        dbias = lse.new_empty(bias.shape if want_bias and bias is not None else (0,))
        drelative = lse.new_empty(relative.shape if want_relative and relative is not None else (0,))
        dtemperature = lse.new_empty(temperature.shape if want_temperature and temperature is not None else (0,))
        launch.module.attention_backward(
            **arguments, out=view(out), lse=lse.data_ptr(), dout=view(dout), dlse=dlse.data_ptr(), dq=view(dq), dk=view(dk),
            dv=view(dv), dbias=dbias.data_ptr() if wanted else 0, bias_sizes=tuple(dbias.shape[:3]) if wanted else (1, 1, 1),
            drelative=drelative.data_ptr() if want_relative and relative is not None else 0,
            dtemperature=dtemperature.data_ptr() if want_temperature and temperature is not None else 0, **place,
        )
        return dq.to(dtype), dk.to(dtype), dv.to(dtype), dbias, drelative, dtemperature


@native_attention_backward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | None, relative: Tensor | None,
      temperature: Tensor | None, arrays: Tensor | None, dense: Tensor | None, code: Sequence[int] | None, scale: float, causal: bool,
      causal_offset: int, grid_rows: int, grid_columns: int, softcap: float, dropout: float, seed: int, out: Tensor,
      lse: Tensor, dout: Tensor, dlse: Tensor, want_bias: bool, want_relative: bool,
      want_temperature: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    grads = [_heads_inside(t, t.shape[0], t.shape[1], t.shape[2], t.shape[3]) for t in (q, k, v)]
    return (grads[0], grads[1], grads[2], lse.new_empty(bias.shape if want_bias and bias is not None else (0,)),
            lse.new_empty(relative.shape if want_relative and relative is not None else (0,)),
            lse.new_empty(temperature.shape if want_temperature and temperature is not None else (0,)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:]


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dlse = torch.zeros_like(lse) if dlse is None else dlse
    wanted = [inputs[at] is not None and ctx.needs_input_grad[at] for at in (4, 5, 6)]  # bias, relative, temperature
    dq, dk, dv, *more = native_attention_backward(*inputs, *ctx.options, out, lse, dout, dlse, *wanted)
    return (dq, dk, dv, None, *(t if want else None for t, want in zip(more, wanted)), *(None,) * 11)


_attention.register_autograd(_backward, setup_context=_save)
