"""Vision model: one tower over pictures, and where classes are named, a linear head over them.

n pictures, P tokens, E width of the tower's pooled vector, K classes. Sources: swin-v2, and the classifiers of part B.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config.options import Options
from vlm.models.base import Model, PixelNorm, refuse_clips
from vlm.models.dual_encoder import PictureOptions
from vlm.models.swin import SwinOptions, SwinTower
from vlm.models.video import VideoTower
from vlm.models.vision_towers import VisionTowerOptions, build_tower
from vlm.runtime.preprocess import Preprocess
from vlm.types import Batch, Outputs, Pictures, VocabularyLayout
from vlm.types.export import ExportPart
from vlm.types.outputs import Wanted, layers_of


class VisionOptions(Options):
    """A tower without a projection, and the classes of its head."""

    kind: Literal["vision"] = "vision"
    tower: VisionTowerOptions
    classes: tuple[str, ...] = Field((), description="names of the classes that the model's own head tells apart; none: no head")
    pictures: PictureOptions = PictureOptions(
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )

    @model_validator(mode="after")
    def _distinct(self) -> VisionOptions:
        if len(set(self.classes)) < len(self.classes):
            raise ValueError("classes must be distinct")
        return self

    @property
    def embed_dim(self) -> int:
        """Width E of the pooled vector."""
        return self.tower.out_width if isinstance(self.tower, SwinOptions) else self.tower.width

    @property
    def text_length(self) -> None:
        """It reads no text."""
        return

    def filled(self, vocabulary: VocabularyLayout) -> VisionOptions:
        return self

    def with_preprocess(self, preprocess: Preprocess) -> VisionOptions:
        """The options with a directory's own preprocessing. Raises ValueError when its size is not the tower's."""
        if preprocess.size != self.tower.image_size:
            raise ValueError(f"pictures of {preprocess.size} pixels for a tower of {self.tower.image_size}")
        pictures = PictureOptions(
            resize=preprocess.resize, interpolation=preprocess.interpolation, mean=preprocess.mean, std=preprocess.std
        )
        return self.model_copy(update={"pictures": pictures})

    def build(self, vocabulary: VocabularyLayout) -> VisionModel:
        return VisionModel(self, vocabulary)


class VisionModel(Model):
    """Pictures to a vector, tokens and class logits. Squares that a stream hides (`Pictures.masked`) are not seen."""

    kind: ClassVar[str] = "vision"
    offers: ClassVar[dict[str, frozenset[str]]] = {"pictures": frozenset({"embedding", "tokens", "hidden", "logits"})}

    def __init__(self, options: VisionOptions, vocabulary: VocabularyLayout) -> None:
        super().__init__()
        self.options: VisionOptions = options
        self.vocabulary = vocabulary
        self.pixel_norm = PixelNorm(options.pictures.mean, options.pictures.std)
        self.tower = build_tower(options.tower, options.embed_dim, project=False)
        self.head = nn.Linear(options.embed_dim, len(options.classes)) if options.classes else None
        if self.head is not None:
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the columns of `logits`."""
        return self.options.classes

    def preprocess(self) -> Preprocess:
        pictures = self.options.pictures
        return Preprocess(self.options.tower.image_size, pictures.resize, pictures.interpolation, pictures.mean, pictures.std)

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Outputs by stream: `embedding` [n, E], `tokens` [n, P, E], `logits` [n, K] and `hidden:L`."""
        out = {}
        for name, fields in wanted.items():
            stream = batch[name]
            if not isinstance(stream, Pictures):
                raise TypeError(f"a vision model reads pictures, stream {name!r} is {type(stream).__name__}")
            out[name] = self._pictures(stream, fields)
        return out

    @property
    def frames(self) -> int | None:
        return self.tower.video.frames if isinstance(self.tower, VideoTower) else None

    def _pictures(self, stream: Pictures, fields: frozenset[str]) -> Outputs:
        pixels, layers = self.pixel_norm(stream.values), layers_of(fields)
        if isinstance(self.tower, VideoTower) and stream.masked is None:
            seen = self.tower.outputs(stream, pixels, fields)
            logits = self.logits(seen.embedding) if "logits" in fields and seen.embedding is not None else None
            return replace(seen, embedding=seen.embedding if "embedding" in fields else None, logits=logits)
        if stream.masked is None:
            x, pooled, hidden = self.tower(pixels, layers)
        elif isinstance(self.tower, SwinTower):
            x, pooled, hidden = self.tower(pixels, layers, stream.masked)
        else:
            raise ValueError("hidden squares are for a tower of kind swin")
        tokens = self.tower.patch_tokens(x) if "tokens" in fields else None
        return Outputs(
            sample_index=stream.sample_index,
            mask=stream.mask,
            embedding=pooled if "embedding" in fields else None,
            tokens=tokens,
            token_mask=None if tokens is None else stream.mask[:, None].expand(tokens.shape[:2]),
            logits=self.logits(pooled) if "logits" in fields else None,
            hidden=hidden,
        )

    def logits(self, pooled: Tensor) -> Tensor:
        """[n, E] -> [n, K]. Raises ValueError for a model without classes."""
        if self.head is None:
            raise ValueError("this model has no head: name its classes (model.classes)")
        return self.head(pooled)

    def export_parts(self) -> dict[str, ExportPart]:
        refuse_clips(self)
        size = self.options.tower.image_size
        outputs = ["embedding", "logits"] if self.head is not None else ["embedding"]
        pixels = {"pixel_values": torch.rand(2, 3, size, size)}
        return {"vision": ExportPart(_VisionGraph(self), pixels, {"pixel_values": {0: "batch"}}, outputs)}


class _VisionGraph(nn.Module):
    """Normalised pictures to the pooled vector, and logits where there is a head."""

    def __init__(self, model: VisionModel) -> None:
        super().__init__()
        self.tower, self.head = model.tower, model.head

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        pooled = self.tower(pixel_values)[1]
        return pooled if self.head is None else (pooled, self.head(pooled))
