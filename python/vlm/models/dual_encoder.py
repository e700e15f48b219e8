"""Dual encoder: one tower a modality, one embedding space.

n rows, N tokens, E embedding width. Sources: clip, siglip and nearly all of part A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from vlm.config.errors import RequestError
from vlm.config.options import Options
from vlm.models.base import Model, PixelNorm, refuse_clips
from vlm.models.knowledge import KnowledgeEncoder, KnowledgeOptions
from vlm.models.towers import TextTowerOptions, TextTransformer
from vlm.models.video import VideoTower
from vlm.models.vision_towers import VisionTowerOptions, build_tower
from vlm.runtime.preprocess import Preprocess
from vlm.runtime.prompt import LearnedPrompt
from vlm.types import Batch, Outputs, Pictures, TokenIds, VocabularyLayout
from vlm.types.export import ExportPart
from vlm.types.outputs import Wanted, layers_of


class PictureOptions(Options):
    """How a picture becomes the vision tower's pixels, in training, evaluation, bundle and server alike."""

    resize: Literal["shortest", "squash", "pad"] = Field(
        "shortest", description="shortest: shorter side, then centre crop; squash: both sides; pad: longer side, the rest black"
    )
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @model_validator(mode="after")
    def _divides(self) -> PictureOptions:
        if min(self.std) <= 0:
            raise ValueError(f"std is {list(self.std)}, expected three numbers above 0")
        return self


class DualEncoderOptions(Options):
    """Two towers and a learned temperature."""

    kind: Literal["dual-encoder"] = "dual-encoder"
    embed_dim: int = Field(gt=0, description="width E of the shared space")
    project_vision: bool = Field(True, description="linear projection after the vision tower (off in SigLIP)")
    log_scale: float = Field(math.log(1 / 0.07), description="initial log of the similarity scale")
    max_scale: float | None = Field(100.0, ge=1, description="the scale is clamped to 1..max_scale; none: free")
    bias: float | None = Field(None, description="initial similarity bias (sigmoid form); none: no bias")
    vision: VisionTowerOptions
    text: TextTowerOptions
    pictures: PictureOptions = PictureOptions()
    knowledge: KnowledgeOptions | None = Field(None, description="an embedding of a text's triples, added to that of the text; none: off")

    @property
    def text_part(self) -> str:
        """Name of the part whose tokenizer a run takes when it starts from parts."""
        return "text"

    @property
    def text_length(self) -> int:
        """Greatest number of tokens of a text."""
        return self.text.length

    def filled(self, vocabulary: VocabularyLayout) -> DualEncoderOptions:
        """The options with what only the tokenizer knows."""
        text = self.text.model_copy(
            update={
                "vocab_size": self.text.vocab_size or vocabulary.size,
                "eos_id": self.text.eos_id if self.text.eos_id is not None else vocabulary.special.get("eos"),
            }
        )
        return self.model_copy(update={"text": text})

    def with_preprocess(self, preprocess: Preprocess) -> DualEncoderOptions:
        """The options with a directory's own preprocessing. Raises ValueError when its size is not the tower's."""
        if preprocess.size != self.vision.image_size:
            raise ValueError(f"pictures of {preprocess.size} pixels for a tower of {self.vision.image_size}")
        pictures = PictureOptions(
            resize=preprocess.resize, interpolation=preprocess.interpolation, mean=preprocess.mean, std=preprocess.std
        )
        return self.model_copy(update={"pictures": pictures})

    def build(self, vocabulary: VocabularyLayout) -> DualEncoder:
        return DualEncoder(self.filled(vocabulary), vocabulary)


class DualEncoder(Model):
    """Pictures and token rows to one space. Streams are told apart by type, not by name.

    With `knowledge`, a text whose stream has triples is embedded with them, and `statistics["plain"]` is its embedding without; one
    without triples is embedded by its words alone.
    """

    kind: ClassVar[str] = "dual-encoder"
    offers: ClassVar[dict[str, frozenset[str]]] = {
        "pictures": frozenset({"embedding", "tokens", "hidden"}),
        "tokens": frozenset({"embedding", "tokens", "hidden"}),
    }

    def __init__(self, options: DualEncoderOptions, vocabulary: VocabularyLayout) -> None:
        super().__init__()
        self.options: DualEncoderOptions = options
        self.vocabulary = vocabulary
        self.pixel_norm = PixelNorm(options.pictures.mean, options.pictures.std)
        self.vision = build_tower(options.vision, options.embed_dim, project=options.project_vision)
        self.text = TextTransformer(options.text, options.embed_dim)
        known = options.knowledge
        self.knowledge = None if known is None else KnowledgeEncoder(known, options.text, options.embed_dim)
        self.log_scale = nn.Parameter(torch.tensor(options.log_scale))
        self.bias = None if options.bias is None else nn.Parameter(torch.tensor(options.bias))

    def scale(self) -> Tensor:
        """log of the similarity scale, clamped to its range (gradient is 0 outside)."""
        limit = self.options.max_scale
        return self.log_scale if limit is None else self.log_scale.clamp(0.0, math.log(limit))

    def preprocess(self) -> Preprocess:
        pictures = self.options.pictures
        return Preprocess(self.options.vision.image_size, pictures.resize, pictures.interpolation, pictures.mean, pictures.std)

    def temperature(self) -> tuple[Tensor | None, Tensor | None]:
        return self.scale(), self.bias

    def encode(self, batch: Batch, wanted: Wanted) -> dict[str, Outputs]:
        """Outputs by stream: `embedding`, `tokens` (projected, with masks) and `hidden:L`."""
        out = {}
        for name, fields in wanted.items():
            stream = batch[name]
            if isinstance(stream, Pictures):
                out[name] = self._pictures(stream, fields)
            elif isinstance(stream, TokenIds):
                out[name] = self._texts(stream, fields)
            else:
                raise TypeError(f"a dual encoder reads pictures and tokens, stream {name!r} is {type(stream).__name__}")
        return out

    @property
    def frames(self) -> int | None:
        return self.vision.video.frames if isinstance(self.vision, VideoTower) else None

    @property
    def prompt(self) -> LearnedPrompt | None:
        shape = self.options.text.prompt
        return None if shape is None else shape.learned

    @property
    def triples(self) -> tuple[int, int] | None:
        known = self.options.knowledge
        return None if known is None else (known.triples, known.tokens)

    def _pictures(self, stream: Pictures, fields: frozenset[str]) -> Outputs:
        if isinstance(self.vision, VideoTower):
            seen = self.vision.outputs(stream, self.pixel_norm(stream.values), fields)
            return replace(seen, log_scale=self.scale(), bias=self.bias)
        x, pooled, hidden = self.vision(self.pixel_norm(stream.values), layers_of(fields))
        tokens = self.vision.patch_tokens(x) if "tokens" in fields else None
        return Outputs(
            sample_index=stream.sample_index,
            mask=stream.mask,
            embedding=self.vision.project(pooled) if "embedding" in fields else None,
            tokens=tokens,
            token_mask=None if tokens is None else stream.mask[:, None].expand(tokens.shape[:2]),
            hidden=hidden,
            log_scale=self.scale(),
            bias=self.bias,
        )

    def _texts(self, stream: TokenIds, fields: frozenset[str]) -> Outputs:
        ids, mask = stream.values, stream.mask
        if self.options.text.pool != "last":  # positions that are padding in every row carry nothing
            used = int(mask.any(0).sum()) if mask.numel() else 0
            ids, mask = ids[:, : max(used, 1)], mask[:, : max(used, 1)]
        x, pooled, hidden = self.text(ids, mask, layers_of(fields))
        embedding, statistics = None, {}
        if "embedding" in fields:
            embedding = self.text.projection(pooled)
            if self.knowledge is not None and stream.triples is not None and stream.triple_mask is not None:
                statistics = {"plain": embedding}  # losses may want the text without its knowledge
                known = self.knowledge(self.text.tokens(stream.triples), stream.triple_mask)
                embedding = self.knowledge.add(embedding, known)
        return Outputs(
            sample_index=stream.sample_index,
            mask=stream.mask.any(1),
            embedding=embedding,
            statistics=statistics,
            tokens=self.text.projection(x) if "tokens" in fields else None,
            token_mask=mask if "tokens" in fields else None,
            hidden=hidden,
            log_scale=self.scale(),
            bias=self.bias,
        )

    def export_parts(self) -> dict[str, ExportPart]:
        refuse_clips(self)
        if self.knowledge is not None:
            raise RequestError(
                "a model with knowledge has no bundle: its triples come from a parser that no graph holds",
                remedy="keep the model directory: every command reads it",
            )
        size, length = self.options.vision.image_size, self.options.text.length
        # The picture after normalisation is what the vision graph takes; the preprocessing graph makes it.
        pixels = torch.rand(2, 3, size, size)
        ids = torch.ones(2, length, dtype=torch.int64)
        if self.options.text.eos_id is not None:
            ids[:, -1] = self.options.text.eos_id
        text_axes = {0: "batch"} if self.options.text.pool == "last" else {0: "batch", 1: "length"}
        return {
            "vision": ExportPart(_VisionGraph(self), {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}, ["embedding"]),
            "text": ExportPart(
                _TextGraph(self),
                {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                {"input_ids": text_axes, "attention_mask": text_axes},
                ["embedding"],
            ),
        }


class _VisionGraph(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.vision = model.vision

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vision.embed(pixel_values)


class _TextGraph(nn.Module):
    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.text = model.text

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text.embed(input_ids, attention_mask.bool())


@dataclass(frozen=True)
class Similarity:
    """How a dual encoder's cosine becomes a score: scale * cosine + bias."""

    scale: float
    bias: float
    form: Literal["softmax", "sigmoid"]

    @classmethod
    def of(cls, model: DualEncoder) -> Similarity:
        bias = model.bias
        return cls(
            scale=float(model.scale().detach().exp()),
            bias=0.0 if bias is None else float(bias.detach()),
            form="softmax" if bias is None else "sigmoid",
        )
