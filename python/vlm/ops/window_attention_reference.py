"""Windowed cosine attention in plain torch operators: the twin of the native kernel and the path that export traces.

B maps, H rows, W columns, h heads, D head width, N positions of a window, n windows of a map. Source: swin-v2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.ops.backend import can_be_looked_at

Pair = tuple[int, int]


def window_partition(x: Tensor, window: Pair) -> Tensor:
    """[B, H, W, C] -> [B, n, N, C], windows and their positions in raster order. H and W must be multiples of the window."""
    b, height, width, c = x.shape
    wh, ww = window
    x = x.reshape(b, height // wh, wh, width // ww, ww, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (height // wh) * (width // ww), wh * ww, c)


def window_reverse(x: Tensor, window: Pair, size: Pair) -> Tensor:
    """The inverse: [B, n, N, C] -> [B, H, W, C] for size (H, W)."""
    (wh, ww), (height, width) = window, size
    x = x.reshape(x.shape[0], height // wh, width // ww, wh, ww, x.shape[3]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(x.shape[0], height, width, x.shape[5])


def padded_size(size: Pair, window: Pair) -> Pair:
    """The least multiples of the window that hold the map."""
    return -(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]


def window_regions(size: Pair, window: Pair, shift: Pair, device: torch.device | None = None) -> Tensor:
    """[n, N] int64: region of each position of each window; two positions attend one another only within a region.
    Positions beyond the map (`size` is that of the map itself) have -1."""
    height, width = padded_size(size, window)
    rows = (torch.arange(height, device=device) + shift[0]) % height  # rolled place -> place in the padded map
    columns = (torch.arange(width, device=device) + shift[1]) % width
    wrapped = 2 * (rows < shift[0]).long()[:, None] + (columns < shift[1]).long()[None, :]
    there = (rows < size[0])[:, None] & (columns < size[1])[None, :]
    regions = torch.where(there, wrapped, torch.full_like(wrapped, -1))
    return window_partition(regions[None, :, :, None], window)[0, :, :, 0]


def relative_index(window: Pair, device: torch.device | None = None) -> Tensor:
    """[N, N] int64: row of the bias table of query i and key j, (dy + Wh - 1)(2 Ww - 1) + dx + Ww - 1, offsets query minus key."""
    wh, ww = window
    y = torch.arange(wh, device=device).repeat_interleave(ww)
    x = torch.arange(ww, device=device).repeat(wh)
    return (y[:, None] - y + wh - 1) * (2 * ww - 1) + x[:, None] - x + ww - 1


def window_attention_reference(qkv: Tensor, tau: Tensor, bias_table: Tensor, *, window: Pair, shift: Pair) -> Tensor:
    """Same contract as `vlm.ops.window_attention` (arguments already checked), in any dtype and on any device.

    qkv [B, H, W, 3 h D], tau [h], bias_table [(2 Wh - 1)(2 Ww - 1), h] -> [B, H, W, h D].
    """
    b, height, width, c3 = qkv.shape
    heads = tau.shape[0]
    if qkv.numel() == 0:
        return qkv[..., : c3 // 3] + 0 * (tau.sum() + bias_table.sum())  # all three have a gradient, of 0
    size = padded_size((height, width), window)
    padded = size != (height, width)
    x = F.pad(qkv, (0, 0, 0, size[1] - width, 0, size[0] - height)) if padded else qkv
    shifted = shift != (0, 0)
    x = torch.roll(x, (-shift[0], -shift[1]), (1, 2)) if shifted else x
    x = window_partition(x, window)
    n, positions = x.shape[1], x.shape[2]
    q, k, v = x.reshape(b, n, positions, 3, heads, c3 // (3 * heads)).permute(3, 0, 1, 4, 2, 5)
    q = F.normalize(q, dim=-1) * tau.to(q.dtype)[:, None, None]
    bias = bias_table.to(q.dtype)[relative_index(window, qkv.device).reshape(-1)]
    bias = bias.reshape(positions, positions, heads).permute(2, 0, 1)[None, None]
    if shifted or padded:
        region = window_regions((height, width), window, shift, qkv.device)
        if can_be_looked_at(x) and not x.isfinite().all():
            y = _by_region(q, k, v, bias, region).transpose(2, 3).flatten(3)
            return _laid_back(y, window, size, shift, (height, width))
        # A position beyond the map attends everything: its row is thrown away, and must not be empty meanwhile.
        allow = (region[:, :, None] == region[:, None, :]) | (region < 0)[:, :, None]
        bias = bias.masked_fill(~allow[None, :, None], -torch.inf)
    p = torch.softmax(q @ F.normalize(k, dim=-1).mT + bias, dim=-1)  # [B, n, h, N, N]
    return _laid_back((p @ v).transpose(2, 3).flatten(3), window, size, shift, (height, width))


def _laid_back(y: Tensor, window: Pair, padded: Pair, shift: Pair, size: Pair) -> Tensor:
    """[B, n, N, C] -> the map [B, H, W, C]."""
    y = window_reverse(y, window, padded)
    y = torch.roll(y, shift, (1, 2)) if shift != (0, 0) else y
    return y[:, : size[0], : size[1]] if padded != size else y


def _by_region(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, region: Tensor) -> Tensor:
    """The same, one region after the other: NaN or infinity in one, multiplied by weights of 0, would reach the others and
    their gradients. q (times tau), k, v [B, n, h, N, D], bias [1, 1, h, N, N], region [n, N] -> [B, n, h, N, D]."""
    zero = torch.zeros((), dtype=q.dtype, device=q.device)
    out = torch.zeros_like(v)
    for number in region.unique().tolist():
        own = (region == number)[None, :, None, :, None]
        qr, kr, vr = (torch.where(own, t, zero) for t in (q, k, v))
        scores = (qr @ F.normalize(kr, dim=-1).mT + bias).masked_fill(~own.mT, -torch.inf)
        scores = torch.where(own.any(-2, keepdim=True), scores, zero)  # a window without this region
        out = torch.where(own, torch.softmax(scores, dim=-1) @ vr, out)
    return out
