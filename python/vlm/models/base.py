"""What every model of the toolkit offers to objectives, trainer, evaluation and export."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm.config.errors import CheckpointError, RequestError
from vlm.config.options import Options
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.prompt import LearnedPrompt
from vlm.runtime.tiling import Tiling
from vlm.types import Batch, Outputs, VocabularyLayout
from vlm.types.export import ExportPart
from vlm.types.outputs import Wanted, split_key


class Model(nn.Module):
    """A model encodes the streams of a batch and says nothing it was not asked for.

    offers: the fields it can give for pictures and for tokens; whatever else an objective asks is refused before training.
    takes_context: whether it reads a text with a picture stream that the request names.
    """

    kind: ClassVar[str]
    options: Options
    vocabulary: VocabularyLayout
    offers: ClassVar[dict[str, frozenset[str]]]
    takes_context: ClassVar[bool] = False

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Outputs of each wanted stream, under the key it was wanted by. Raises KeyError for a stream that the batch lacks."""
        raise TypeError(f"{type(self).__name__} defines no encode")

    @staticmethod
    def split_key(key: str) -> tuple[str, str | None]:
        """(stream, context) of a wanted key: `text@image.noisy` is the text read with the pictures of `image.noisy`."""
        return split_key(key)

    def take_part(self, name: str, source: Model) -> None:
        """Copy the weights of the part `name` (a dotted module name) from the part of that name of another model.

        Raises RequestError when either model has no such part, CheckpointError for a tensor that is missing or misshapen.
        """
        mine, theirs = part_of(self, name).state_dict(), part_of(source, name).state_dict()
        between = f"part {name!r} of this {self.kind} model and of the {source.kind} model given for it differ"
        odd = sorted(mine.keys() ^ theirs.keys())
        if odd:
            raise CheckpointError(f"{between}: only {'this' if odd[0] in mine else 'the given'} model has {name}.{odd[0]}")
        for key, tensor in mine.items():
            if tensor.shape != theirs[key].shape:
                raise CheckpointError(f"{between}: {name}.{key} is {tuple(tensor.shape)} here and {tuple(theirs[key].shape)} there")
        with torch.no_grad():
            for key, tensor in mine.items():
                tensor.copy_(theirs[key])

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
    def tiling(self) -> Tiling | None:
        """How a picture is cut into rows of the picture streams; None: it is one row of each."""
        return None

    @property
    def frames(self) -> int | None:
        """Most pictures of a sample that are read together, as a clip; None: a picture is read by itself."""
        return None

    @property
    def triples(self) -> tuple[int, int] | None:
        """Triples of a text that are read beside it, and tokens of each of their parts; None: the text alone is read."""
        return None

    @property
    def picture_positions(self) -> int | None:
        """Positions that one row of pictures takes in a row of text; None for a model that expands none."""
        return None

    @property
    def training_positions(self) -> int | None:
        """The same of a training step, where positions may be dropped only later."""
        return self.picture_positions

    @property
    def tiles_apart(self) -> bool:
        """Whether tiles and their tags have no position in a row of text, so that thumbnails alone have."""
        return False

    @property
    def prompt(self) -> LearnedPrompt | None:
        """The prompt that it has learned for class names; None for a model without one."""
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


def refuse_clips(model: Model) -> None:
    """Raises RequestError for a model of clips: the graphs of a bundle read single pictures."""
    if model.frames is not None:
        raise RequestError("a model of clips has no bundle", remedy="keep the model directory: every command reads it")


def part_of(model: Model, name: str) -> nn.Module:
    """The module of a dotted name. Raises RequestError that lists the parts there are."""
    found = dict(model.named_modules(remove_duplicate=False)).get(name)
    if found is None or found is model:
        known = ", ".join(child for child, _ in model.named_children())
        raise RequestError(f"a {model.kind} model has no part {name!r}", remedy=f"its parts: {known}")
    return found


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
