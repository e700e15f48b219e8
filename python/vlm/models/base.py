"""What every model of the toolkit offers to objectives, trainer, evaluation and export."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.runtime.preprocess import Preprocess
from vlm.types import Batch, Outputs, VocabularyLayout
from vlm.types.export import ExportPart
from vlm.types.outputs import Wanted


class Model(nn.Module):
    """A model encodes the streams of a batch and says nothing it was not asked for.

    offers: the fields it can give for pictures and for tokens, checked when a preset is validated.
    """

    kind: ClassVar[str]
    options: Options
    vocabulary: VocabularyLayout
    offers: ClassVar[dict[str, frozenset[str]]]

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Outputs of each wanted stream. Raises KeyError for a stream that the batch lacks."""
        raise TypeError(f"{type(self).__name__} defines no encode")

    def temperature(self) -> tuple[Tensor | None, Tensor | None]:
        """(log scale, bias) of the model's own similarity, with gradient; (None, None) for a model without one."""
        return None, None

    def preprocess(self) -> Preprocess | None:
        """How a picture becomes pixels of this model; None for a model that reads none."""
        return None

    def preprocesses(self) -> dict[str, Preprocess]:
        """How pictures become the pixels of each picture stream that the model reads; one stream, `image`, for most."""
        single = self.preprocess()
        return {} if single is None else {"image": single}

    @property
    def picture_positions(self) -> int | None:
        """Positions that one row of pictures takes in a row of text; None for a model that expands none."""
        return None

    def export_parts(self) -> dict[str, ExportPart]:
        """The graphs that a bundle of this model has."""
        raise TypeError(f"{type(self).__name__} defines no export_parts")

    def set_recompute(self, on: bool) -> None:
        """Activation checkpointing in every trunk."""
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = on  # type: ignore[assignment]

    def forward(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        return self.encode(batch, wanted)


class PixelNorm(nn.Module):
    """Pictures as the data gives them to pixels as the towers want them: (x / 255 - mean) / std, float32."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, 3, H, W] uint8 (0..255) or float (0..1)."""
        x = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
        return (x - self.mean) / self.std
