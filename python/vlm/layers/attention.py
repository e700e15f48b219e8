"""Multi-head attention with its projections. B rows, N positions, C width, H heads, G key and value heads, D head width."""

from __future__ import annotations

from torch import Tensor, nn

from vlm import ops
from vlm.layers.options import TrunkOptions
from vlm.layers.rotary import rotate


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
