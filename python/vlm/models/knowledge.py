"""Knowledge of a text: an embedding of the triples of its scene graph. Source: structure-clip.

n texts, K triples, L tokens of a part, C width of the text tower, E embedding width.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.layers import Trunk, TrunkOptions, normalise
from vlm.models.towers import TextOptions


class KnowledgeOptions(Options):
    """`[model.knowledge]`: triples (head, relation, tail) as vectors h + r - t, through a small transformer.

    Part names are embedded by the text tower's own table, and the transformer has its width, heads and feed-forward ratio.
    """

    kind: Literal["triples"] = "triples"
    weight: float = Field(0.2, ge=0, allow_inf_nan=False, description="how much of it is added to a text of length 1; 0: nothing")
    layers: int = Field(6, ge=1, description="blocks of the transformer over triples")
    triples: int = Field(6, ge=1, le=64, description="triples of a text that are read, the first ones")
    tokens: int = Field(5, ge=1, le=64, description="tokens of a head, relation or tail that are read")


class KnowledgeEncoder(nn.Module):
    """Triples to unit vectors; the order of triples says nothing. A text without triples has the vector 0."""

    def __init__(self, options: KnowledgeOptions, text: TextOptions, embed_dim: int) -> None:
        super().__init__()
        self.options = options
        width = text.width
        self.first = nn.Parameter(torch.randn(width) * 0.02)
        self.trunk = Trunk(
            TrunkOptions(
                width=width, depth=options.layers, heads=text.heads, ffn_width=text.ffn_width, activation=text.activation,
                norm_eps=text.norm_eps,
            )
        )
        self.norm = nn.LayerNorm(width, eps=text.norm_eps)
        self.projection = nn.Linear(width, embed_dim)
        nn.init.normal_(self.projection.weight, std=width**-0.5)
        nn.init.zeros_(self.projection.bias)

    def forward(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """embedded [n, K, 3, L, C] of the tokens of each part, mask [n, K, 3, L] -> [n, E] float32 of length 1, or 0 without triples."""
        triples, valid = triple_vectors(embedded, mask)
        x = torch.cat([self.first.to(triples.dtype).expand(len(triples), 1, -1), triples], dim=1)
        seen = torch.cat([valid.new_ones(len(valid), 1), valid], dim=1)
        x, _ = self.trunk(x, key_mask=seen)
        known = normalise(self.projection(self.norm(x[:, 0])))
        return torch.where(valid.any(1, keepdim=True), known, torch.zeros_like(known))

    def add(self, text: Tensor, known: Tensor) -> Tensor:
        """text [n, E] of any length, known [n, E] of length 1 -> text + weight |text| known: scaled to length 1, that is the text of
        length 1 with `weight` of its knowledge."""
        length = text.float().norm(dim=-1, keepdim=True)
        return text + (self.options.weight * length * known).to(text.dtype)


def triple_vectors(embedded: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """embedded [n, K, 3, L, C], mask [n, K, 3, L] -> (h + r - t [n, K, C], which triples there are [n, K]).

    A part is the mean of its own tokens: padding is not counted. A triple without a token is none, and its vector 0.
    """
    tokens = torch.where(mask[..., None], embedded, torch.zeros_like(embedded))
    parts = tokens.sum(3) / mask.sum(3).clamp(min=1)[..., None].to(tokens.dtype)
    return parts[:, :, 0] + parts[:, :, 1] - parts[:, :, 2], mask.flatten(2).any(2)
