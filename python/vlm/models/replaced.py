"""Replaced-token detection: a small generator fills hidden tokens, the encoder tells which tokens are not the text's own.

n rows, N positions, C width, c generator width, V ids, R hidden positions. Source: budget-longformer (ELECTRA).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm import ops
from vlm.config.options import Options
from vlm.layers import TrunkOptions, norm_of
from vlm.models.attending import AttendingTrunk
from vlm.types import Layout


class ReplacedOptions(Options):
    """The generator beside an encoder. It reads and predicts through the encoder's own embeddings."""

    width: float = Field(0.25, gt=0, le=1, description="its width, heads and feed-forward width as a share of the encoder's")
    hidden: float = Field(0.15, gt=0, lt=1, description="share of the tokens that are hidden from it")

    def trunk(self, options: TrunkOptions) -> TrunkOptions:
        """The encoder's trunk at the width of the generator, heads of the same width."""
        head = options.head_width or options.width // options.heads
        heads = max(1, round(options.heads * self.width))
        ffn = max(1, round(options.ffn_width * self.width))
        return options.model_copy(update={"width": heads * head, "heads": heads, "kv_heads": None, "head_width": head, "ffn_width": ffn})


@dataclass(frozen=True)
class Replacement:
    """hidden bool [n, N]; ids [n, N], what the encoder reads; nats [n, N], -log p of the hidden tokens by the generator, 0
    elsewhere. replaced [n, N]: where ids differ from the text."""

    hidden: Tensor
    ids: Tensor
    nats: Tensor
    replaced: Tensor


class Replacer(nn.Module):
    """The generator with what it shares nothing of, and the head that tells replaced tokens."""

    def __init__(self, options: ReplacedOptions, trunk: TrunkOptions) -> None:
        super().__init__()
        self.options = options
        small = options.trunk(trunk)
        self.mask_token = nn.Parameter(torch.randn(trunk.width) * 0.02)
        self.enter = nn.Linear(trunk.width, small.width)
        self.trunk = AttendingTrunk(small)
        self.norm = norm_of(trunk.norm, small.width, trunk.norm_eps)
        self.leave = nn.Linear(small.width, trunk.width)
        self.head = nn.Sequential(nn.Linear(trunk.width, trunk.width), nn.GELU(), nn.Linear(trunk.width, 1))

    def replace(self, layout: Layout, ids: Tensor, embedding: nn.Embedding, special: tuple[int, ...]) -> Replacement:
        """ids [n, N] with hidden tokens drawn anew; draws from torch's generator. Special ids are never hidden.

        No gradient passes through the draw.
        """
        usual = layout.mask.clone()
        for token in special:
            usual &= ids != token
        hidden = usual & (torch.rand(ids.shape, device=ids.device) < self.options.hidden)
        x = embedding(ids)
        x = self.enter(torch.where(hidden[..., None], self.mask_token.to(x.dtype), x))
        x = self.trunk.run(x, layout, None, False, ())[0]
        told = self.leave(self.norm(x[hidden]))  # [R, C]
        nats = x.new_zeros(ids.shape, dtype=torch.float32)
        drawn = ids.clone()
        if len(told):
            loss = ops.linear_cross_entropy(told, embedding.weight, ids[hidden]).loss
            nats = nats.masked_scatter(hidden, loss.float())
            with torch.no_grad():
                drawn[hidden] = drawn_of(told, embedding.weight)
        return Replacement(hidden, drawn, nats, drawn != ids)

    def detect(self, x: Tensor) -> Tensor:
        """x [n, N, C] after the encoder's final norm -> logits [n, N] of being replaced, float32."""
        return self.head(x)[..., 0].float()


def drawn_of(hidden: Tensor, weight: Tensor, chunk: int = 2**24) -> Tensor:
    """Ids [R] drawn from softmax(hidden weight^T) by Gumbel's maximum; logits are held for a few rows at a time."""
    step = max(1, chunk // weight.shape[0])
    out = []
    for part in hidden.split(step):
        logits = F.linear(part.float(), weight.float())
        noise = -torch.empty_like(logits).exponential_().log()
        out.append((logits + noise).argmax(1))
    return torch.cat(out)
