"""Learned vectors at the input of a text tower, in place of the words of a prompt.

n rows, T positions, C width, M vectors of a row, K classes. Source: coop.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.runtime.prompt import LearnedPrompt


class ContextOptions(Options):
    """The shape of a learned prompt; `[tuning.prompt]` makes it."""

    length: int = Field(ge=0, le=4096, description="vectors of a row, M")
    position: Literal["end", "middle", "front"] = Field("end", description="where the class name stands")
    ending: str = Field(".", description="what closes the text")
    classes: tuple[str, ...] = Field((), description="classes with vectors of their own; none: all share M vectors")
    first_id: int = Field(ge=0, description="id of the first special token that stands for them")

    @property
    def learned(self) -> LearnedPrompt:
        return LearnedPrompt(self.length, self.position, self.ending, self.classes)


class Context(nn.Module):
    """vectors [M, C], or [K, M, C] where each class has its own.

    A row of ids says where they go: the j-th token of the prompt in a row is vector j, or the last one beyond M.
    """

    def __init__(self, options: ContextOptions, width: int, eos_id: int | None) -> None:
        super().__init__()
        self.options = options
        self.rows = max(1, len(options.classes))
        shape = (options.length, width) if not options.classes else (self.rows, options.length, width)
        self.vectors = nn.Parameter(torch.randn(shape) * 0.02)
        self.filler = 1 if eos_id == 0 else 0  # an id that is embedded and thrown away, and never the one that is pooled at

    def learned(self, ids: Tensor) -> Tensor:
        """[n, T] bool: where a vector stands."""
        return (ids >= self.options.first_id) & (ids < self.options.first_id + self.rows)

    def without(self, ids: Tensor) -> Tensor:
        """[n, T] ids that the tower knows: another one in place of each token of the prompt."""
        return torch.where(self.learned(ids), torch.full_like(ids, self.filler), ids)

    def forward(self, embedded: Tensor, ids: Tensor) -> Tensor:
        """[n, T, C] -> [n, T, C]: the vectors put where they stand. Rows without any stay bit for bit."""
        length = self.options.length
        if length == 0:
            return embedded
        learned = self.learned(ids)
        place = (learned.to(torch.int64).cumsum(1) - 1).clamp(0, length - 1)
        row = (ids - self.options.first_id).clamp(0, self.rows - 1)
        vectors = F.embedding(row * length + place, self.vectors.reshape(self.rows * length, -1))
        return torch.where(learned[..., None], vectors.to(embedded.dtype), embedded)
