"""Transformer blocks shared by every tower and trunk.

One block with options instead of one class a paper: norm, feed-forward kind, biases, rotary positions, grouped
keys and values. B rows, N positions, C width, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlm import ops
from vlm.attention import DecoderAttention, MixerOptions
from vlm.attention.mixer import SimpleRmsNorm
from vlm.config.options import Options

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "identity"]
NormKind = Literal["layernorm", "rmsnorm", "srms"]


class TrunkOptions(Options):
    """Shape of a stack of transformer blocks."""

    width: int = Field(gt=0, description="channels C")
    depth: int = Field(gt=0, description="number of blocks")
    heads: int = Field(gt=0, description="query heads; C must be a multiple unless head_width is given")
    kv_heads: int | None = Field(None, description="key and value heads (grouped queries); default: heads")
    head_width: int | None = Field(None, description="channels of one head; default: width / heads")
    ffn_width: int = Field(gt=0, description="hidden channels of the feed-forward layer")
    ffn: Literal["mlp", "gated"] = Field("mlp", description="mlp: up, act, down; gated: act(gate) * up, down")
    activation: Activation = "gelu"
    norm: NormKind = "layernorm"
    norm_eps: float = 1e-5
    bias: bool = Field(True, description="biases in attention and feed-forward layers")
    qkv_bias: bool | None = Field(None, description="biases of queries, keys and values (Qwen2); default: bias")
    rope_theta: float | None = Field(None, description="base of rotary positions; none: no rotary positions")
    mixer: MixerOptions | None = Field(None, description="recurrent layer in place of attention; see vlm.models.recurrent")
    attention: DecoderAttention | None = Field(None, description="what queries see; see vlm.models.attending, vlm.models.far")
    causal: bool = Field(True, description="of a decoder loop: positions see none after them")


def activation_of(kind: Activation) -> nn.Module:
    """The activation named in a preset; quick_gelu is x * sigmoid(1.702 x)."""
    if kind == "quick_gelu":
        return QuickGelu()
    return {"gelu": nn.GELU(), "gelu_tanh": nn.GELU(approximate="tanh"), "silu": nn.SiLU(), "identity": nn.Identity()}[kind]


class QuickGelu(nn.Module):
    """x * sigmoid(1.702 x), the activation of the published CLIP weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last axis, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def norm_of(kind: NormKind, width: int, eps: float) -> nn.Module:
    """The norm named in a preset; srms is the root mean square norm without weights."""
    if kind == "srms":
        return SimpleRmsNorm(eps)
    return RmsNorm(width, eps) if kind == "rmsnorm" else nn.LayerNorm(width, eps=eps)


def rotary_tables(position: Tensor, head_width: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos, sin [B, 1, N, D] float32 for positions [B, N]; half-split layout (Llama)."""
    half = torch.arange(0, head_width, 2, device=position.device, dtype=torch.float32) / head_width
    angles = position[..., None].float() * (theta**-half)
    angles = torch.cat([angles, angles], dim=-1)[:, None]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on x [B, H, N, D]."""
    cos, sin = (table.to(x.dtype) for table in tables)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head attention with optional grouped keys and values and rotary positions."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.heads = options.heads
        self.kv_heads = options.kv_heads or options.heads
        self.head_width = options.head_width or options.width // options.heads
        inner, kv_inner = self.heads * self.head_width, self.kv_heads * self.head_width
        qkv_bias = options.bias if options.qkv_bias is None else options.qkv_bias
        self.q = nn.Linear(options.width, inner, bias=qkv_bias)
        self.k = nn.Linear(options.width, kv_inner, bias=qkv_bias)
        self.v = nn.Linear(options.width, kv_inner, bias=qkv_bias)
        self.out = nn.Linear(inner, options.width, bias=options.bias)

    def forward(
        self,
        x: Tensor,
        *,
        context: Tensor | None = None,
        causal: bool = False,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, N, C] attends itself, or `context` [B, M, C]; key_mask [B, M] true where a key may be seen;
        bias broadcastable to [B, H, N, M], added to the logits."""
        q = self.queries(x, rotary)
        k, v = self.keys_values(x if context is None else context, rotary)
        return self.attend(q, k, v, causal=causal, key_mask=key_mask, bias=bias)

    def queries(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, N, C] -> queries [B, H, N, D]."""
        q = self.q(x).view(x.shape[0], x.shape[1], self.heads, self.head_width).transpose(1, 2)
        return q if rotary is None else rotate(q, rotary)

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """x [B, M, C] -> keys, values [B, G, M, D]."""
        v = self.v(x).view(x.shape[0], x.shape[1], self.kv_heads, self.head_width).transpose(1, 2)
        return self.keys(x, rotary), v

    def keys(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, M, C] -> keys [B, G, M, D]."""
        k = self.k(x).view(x.shape[0], x.shape[1], self.kv_heads, self.head_width).transpose(1, 2)
        return k if rotary is None else rotate(k, rotary)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """q [B, H, N, D], k, v [B, G, M, D] -> [B, N, C]; causal sees the M - N keys before the first query too."""
        return self.merged(ops.attention(q, k, v, causal=causal, key_mask=key_mask, bias=bias))

    def merged(self, y: Tensor) -> Tensor:
        """What the heads read, y [B, H, N, D], -> [B, N, C]."""
        return self.out(y.transpose(1, 2).reshape(y.shape[0], y.shape[2], self.heads * self.head_width))


class FeedForward(nn.Module):
    """Two or three linear layers around an activation."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.gate = nn.Linear(options.width, options.ffn_width, bias=options.bias) if options.ffn == "gated" else None
        self.up = nn.Linear(options.width, options.ffn_width, bias=options.bias)
        self.down = nn.Linear(options.ffn_width, options.width, bias=options.bias)
        self.activation = activation_of(options.activation)

    def initialise(self, width: int, depth: int) -> None:
        """Depth-scaled normal initialisation of the CLIP paper's text tower."""
        for wide in (self.up, self.gate):
            if wide is not None:
                nn.init.normal_(wide.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(self.down.weight, std=width**-0.5 * (2 * depth) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.norm1 = norm_of(options.norm, options.width, options.norm_eps)
        self.attention = Attention(options)
        self.norm2 = norm_of(options.norm, options.width, options.norm_eps)
        self.ffn = FeedForward(options)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        x = x + self.attention(self.norm1(x), causal=causal, key_mask=key_mask, bias=bias, rotary=rotary)
        return x + self.ffn(self.norm2(x))

    def extend(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor] | None,
        key_mask: Tensor | None = None,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Causal block over x [B, N, C] behind `past` keys and values [B, G, P, D], which are rotated already.

        rotary: of the N new positions; key_mask [B, P + N]. Returns (x, keys, values [B, G, P + N, D]).
        """
        q, k, v = self.project(x, rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        return self.attend(x, q, k, v, key_mask, bias), k, v

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, N, C] -> queries [B, H, N, D], keys, values [B, G, N, D] of the normalised x, rotated."""
        y = self.norm1(x)
        q = self.attention.queries(y, rotary)
        return q, *self.attention.keys_values(y, rotary)

    def attend(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """The block after `project`: q of x [B, N, C] attends causally k, v [B, G, P + N, D]; key_mask [B, P + N]."""
        x = x + self.attention.attend(q, k, v, causal=True, key_mask=key_mask, bias=bias)
        return x + self.ffn(self.norm2(x))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The block after its heads have read `mixed` [B, H, N, D]."""
        x = x + self.attention.merged(mixed)
        return x + self.ffn(self.norm2(x))


class Trunk(nn.Module):
    """A stack of blocks. `recompute` trades time for memory in backward."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.options = options
        self.blocks = nn.ModuleList(Block(options) for _ in range(options.depth))
        self.recompute = False
        self._initialise()

    def _initialise(self) -> None:
        """Depth-scaled normal initialisation of the CLIP paper's text tower, for every trunk."""
        width, depth = self.options.width, self.options.depth
        out_std = width**-0.5 * (2 * depth) ** -0.5
        blocks: Any = self.blocks
        for block in blocks:
            for linear in (block.attention.q, block.attention.k, block.attention.v):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(block.attention.out.weight, std=out_std)
            block.ffn.initialise(width, depth)
            for name, parameter in block.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = False,
        key_mask: Tensor | None = None,
        segment: Tensor | None = None,
        position: Tensor | None = None,
        collect: Collection[int] = (),
        stop: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """x [B, N, C] -> (x after the last block, hidden states by layer); only the first `stop` blocks if given.

        key_mask [B, N]; segment [B, N] packed documents, which never see one another; position [B, N] for rotary
        positions (default 0..N-1). Layer 0 is the input, layer l the output of block l.
        """
        rotary = None
        if self.options.rope_theta is not None:
            if position is None:
                position = torch.arange(x.shape[1], device=x.device)[None]
            rotary = self.rotary(position)
        bias = None if segment is None else segment_bias(segment, x.dtype)
        hidden = {0: x} if 0 in collect else {}
        for layer, block in enumerate(self.blocks[:stop], start=1):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, causal, key_mask, bias, rotary, use_reentrant=False)
            else:
                x = block(x, causal, key_mask, bias, rotary)
            if layer in collect:
                hidden[layer] = x
        return x, hidden

    def rotary(self, position: Tensor) -> tuple[Tensor, Tensor] | None:
        """cos, sin of positions [B, N] for this trunk's heads; None without rotary positions."""
        if self.options.rope_theta is None:
            return None
        head = self.options.head_width or self.options.width // self.options.heads
        return rotary_tables(position, head, self.options.rope_theta)


def segment_bias(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, N, N] for segment [B, N]: 0 within a document, -inf between two."""
    apart = segment[:, None, :, None] != segment[:, None, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=segment.device).masked_fill_(apart, -torch.inf)


def layers_of(fields: Collection[str]) -> set[int]:
    """The layers asked for in a set of fields: {"embedding", "hidden:4"} -> {4}."""
    return {int(name.partition(":")[2]) for name in fields if name.startswith("hidden:")}


def normalise(x: Tensor) -> Tensor:
    """Unit length over the last axis, in float32."""
    return F.normalize(x.float(), dim=-1)
