"""What joins the frames of a clip: messages, attention divided into time and space, and the head over frames.

n rows of frames, B clips, T frames, N tokens of a frame, C width, E width of a frame's vector. Sources: core-crossframe, xclip.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vlm.layers import Attention, Block, Trunk, TrunkOptions
from vlm.models.video.clips import Clips
from vlm.models.video.options import IntegrationOptions


class MessageToken(nn.Module):
    """One block with messages: of each class token a message, which all frames of the clip exchange by attention; it stands
    behind the tokens of its own frame in their attention and is dropped after it."""

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.message = nn.Linear(options.width, options.width)
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.attention = _fresh(options)
        nn.init.normal_(self.message.weight, std=options.width**-0.5)
        nn.init.zeros_(self.message.bias)

    def exchanged(self, class_tokens: Tensor, clips: Clips) -> Tensor:
        """class_tokens [n, C] -> the messages of the frames after the exchange [n, C]."""
        messages = clips.gather(self.message(class_tokens))
        return clips.rows(messages + self.attention(self.norm(messages), key_mask=clips.key_mask))

    def forward(self, block: Block, x: Tensor, clips: Clips) -> Tensor:
        """x [n, N, C] with the class token first -> [n, N, C] after `block`."""
        y = torch.cat([x, self.exchanged(x[:, 0], clips)[:, None]], dim=1)
        x = (y + block.attention(block.norm1(y)))[:, :-1]
        return x + block.ffn(block.norm2(x))


class Divided(nn.Module):
    """One block with time apart from space: every position attends itself in all frames of its clip, then comes the block."""

    def __init__(self, options: TrunkOptions, *, zero_init: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(options.width, eps=options.norm_eps)
        self.attention = _fresh(options)
        if zero_init:
            nn.init.zeros_(self.attention.out.weight)

    def forward(self, block: Block, x: Tensor, clips: Clips) -> Tensor:
        """x [n, N, C] -> [n, N, C] after `block`."""
        y = clips.gather(self.norm(x)).transpose(1, 2)  # [B, N, T, C]
        count, tokens = y.shape[:2]
        mask = clips.key_mask
        mask = None if mask is None else mask[:, None].expand(-1, tokens, -1).flatten(0, 1)
        moved = self.attention(y.flatten(0, 1), key_mask=mask).unflatten(0, (count, tokens)).transpose(1, 2)
        return block(x + clips.rows(moved))


class Integration(nn.Module):
    """Vectors of frames to one of the clip: mean over frames of c + transformer(c + positions)."""

    def __init__(self, options: IntegrationOptions, width: int, frames: int, tower: TrunkOptions) -> None:
        """Raises ValueError where the heads do not divide the width."""
        super().__init__()
        heads = options.heads or max(1, width // 64)
        if width % heads:
            raise ValueError(f"integration.heads is {heads}, expected a divisor of the {width} channels of a frame's vector")
        shape = {"width": width, "depth": options.layers, "heads": heads, "ffn_width": 4 * width}
        self.trunk = Trunk(TrunkOptions(**shape, activation=tower.activation, norm_eps=tower.norm_eps))
        self.positions = nn.Parameter(torch.randn(frames, width) * 0.3) if options.positions else None

    def forward(self, vectors: Tensor, clips: Clips) -> Tensor:
        """vectors [n, E] of frames -> [B, E]."""
        c = clips.gather(vectors)
        x = c if self.positions is None else c + self.positions[: c.shape[1]]
        return clips.mean(c + self.trunk(x, key_mask=clips.key_mask)[0])


def _fresh(options: TrunkOptions) -> Attention:
    """Attention with the initialisation that a trunk gives its own."""
    attention = Attention(options)
    for linear in (attention.q, attention.k, attention.v):
        nn.init.normal_(linear.weight, std=options.width**-0.5)
    nn.init.normal_(attention.out.weight, std=options.width**-0.5 * (2 * options.depth) ** -0.5)
    for linear in (attention.q, attention.k, attention.v, attention.out):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    return attention
