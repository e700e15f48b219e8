"""Masked pixels: what was hidden is told from what was not. B pictures, P tokens, s pixels a token's side. Source: swin-v2 (SimMIM)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from vlm.models.base import PixelNorm
from vlm.objectives.base import BuildContext, Objective, ObjectiveOptions
from vlm.types import Batch, Context, Pictures, Request, Terms, Views


class MaskedPixelsOptions(ObjectiveOptions):
    """Distance of predicted and true normalised pixels over the hidden squares of a stream of kind `masked-pixels`."""

    kind: Literal["masked-pixels"] = "masked-pixels"
    name: str = "masked-pixels"
    stream: str = Field("image.masked", description="picture stream with hidden squares")
    distance: Literal["l1", "l2"] = Field("l1", description="l1: absolute difference; l2: its square")

    def build(self, context: BuildContext) -> MaskedPixels:
        options: Any = context.model.options
        tower: Any = getattr(options, "tower", None)
        preprocess = context.model.preprocess()
        if preprocess is None or not hasattr(tower, "stride") or not getattr(tower, "mask_token", False):
            raise ValueError("it needs a tower that can hide squares: kind swin, mask_token = true")
        if preprocess.size % tower.stride:
            raise ValueError(f"pictures of {preprocess.size} pixels for a tower of stride {tower.stride}: no whole number of tokens")
        return MaskedPixels(self, options.embed_dim, tower.stride, PixelNorm(preprocess.mean, preprocess.std))


class MaskedPixels(Objective):
    """values [B]: mean distance over the hidden pixel values of a picture; weights: how many there are.

    So the loss of an update is the sum of distances over all hidden values, divided by their number.
    """

    def __init__(self, options: MaskedPixelsOptions, width: int, stride: int, pixel_norm: PixelNorm) -> None:
        super().__init__()
        self.options, self.stride = options, stride
        self.requires = (Request.parse(f"model/{options.stream}.tokens"),)
        self.reads = (options.stream,)
        self.pixel_norm = pixel_norm
        self.head = nn.Linear(width, 3 * stride * stride)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def count(self, batch: Batch) -> Tensor:
        """Hidden pixel values."""
        stream = self._stream(batch)
        assert stream.masked is not None
        squares = stream.masked.flatten(1).sum(1).double() * stream.mask
        return (squares * self._values_of_square(stream)).sum()

    def forward(self, views: Views, context: Context) -> Terms:
        view, stream = views[f"model/{self.options.stream}"], self._stream(context.batch)
        assert view.tokens is not None
        assert stream.masked is not None
        wanted = self.pixel_norm(stream.values)
        difference = self.picture(view.tokens, wanted.shape[-1]) - wanted
        distance = (difference.abs() if self.options.distance == "l1" else difference.square()).sum(1)
        n, grid = stream.masked.shape[:2]
        side = wanted.shape[-1] // grid
        by_square = distance.reshape(n, grid, side, grid, side).sum((2, 4))  # [n, g, g]
        weights = stream.masked.flatten(1).sum(1) * self._values_of_square(stream) * stream.mask
        total = (by_square * stream.masked).flatten(1).sum(1)
        return Terms(total / weights.clamp(min=1), weights.to(total.dtype), view.sample_index)

    def picture(self, tokens: Tensor, side: int) -> Tensor:
        """[n, P, C] -> predicted normalised pixels [n, 3, side, side], float32."""
        s, x = self.stride, self.head(tokens.to(self.head.weight.dtype)).float()
        x = x.reshape(x.shape[0], side // s, side // s, 3, s, s).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(x.shape[0], 3, side, side)

    def _stream(self, batch: Batch) -> Pictures:
        stream = batch[self.options.stream]
        if not isinstance(stream, Pictures) or stream.masked is None:
            raise ValueError(f'stream {self.options.stream!r} hides nothing: give [data.streams] an entry of kind "masked-pixels"')
        return stream

    @staticmethod
    def _values_of_square(stream: Pictures) -> int:
        assert stream.masked is not None
        side = stream.values.shape[-1] // stream.masked.shape[-1]
        return 3 * side * side


