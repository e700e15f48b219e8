"""What a preset may say of the towers of a model that reads pictures, and of how pictures and text meet."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.layers import Activation
from vlm.models.dual_encoder import PictureOptions
from vlm.models.towers import VitOptions
from vlm.runtime.preprocess import Preprocess
from vlm.tokens import TowerMergeOptions


class VitTowerOptions(Options):
    """A vision transformer and what is read of it. The shape may be left open where `[start.parts]` brings it."""

    kind: Literal["vit"] = "vit"
    width: int | None = Field(None, gt=0, description="channels; default: the part's")
    depth: int | None = Field(None, gt=0, description="number of blocks; default: the part's")
    heads: int | None = Field(None, gt=0, description="attention heads; default: the part's")
    image_size: int | None = Field(None, gt=0, description="side of the picture in pixels; default: the part's")
    patch_size: int | None = Field(None, gt=0, description="side of a patch in pixels; default: the part's")
    ffn_ratio: float = Field(4.0, gt=0, description="feed-forward width over width")
    activation: Activation = "gelu"
    norm_eps: float = Field(1e-5, gt=0)
    drop_remainder: bool = Field(False, description="leave out pixels at the right and the bottom that fill no patch, instead of refusing them")
    class_token: bool = Field(True, description="prepend a learned token")
    patch_bias: bool = Field(False, description="bias in the patch embedding")
    pre_norm: bool = Field(True, description="layer norm before the first block")
    layer: int = Field(-1, description="hidden layer that is read: -1 the last, -2 the one before (LLaVA), 0 the input")
    norm: bool = Field(True, description="the tower's final norm on what is read (LLaVA has none)")
    drop_class: bool = Field(True, description="leave out the class token")
    merge: TowerMergeOptions | None = Field(None, description="merge similar tokens between layers; none: keep all, or as the part does")
    pictures: PictureOptions = PictureOptions()

    @model_validator(mode="after")
    def _layer_exists(self) -> VitTowerOptions:
        if self.depth is not None and not -self.depth - 1 <= self.layer <= self.depth:
            raise ValueError(f"layer {self.layer} of a tower of {self.depth} blocks")
        return self

    @property
    def is_open(self) -> bool:
        return None in (self.width, self.depth, self.heads, self.image_size, self.patch_size)

    def vit(self) -> VitOptions:
        """The tower's shape. Raises ValueError while it is open."""
        if self.is_open:
            raise ValueError("the tower has no shape: give width, depth, heads, image_size and patch_size, or the part in [start.parts]")
        shared = {name: getattr(self, name) for name in VitOptions.model_fields if name in type(self).model_fields and name != "kind"}
        return VitOptions(**shared, pool="cls")  # "cls" adds no parameters, and no pooled vector is read here

    def of_part(self, vit: VitOptions, pictures: PictureOptions) -> VitTowerOptions:
        """The shape of `vit`; what is read of it stays, and pictures stay where they were given."""
        shape = {name: getattr(vit, name) for name in VitOptions.model_fields if name in type(self).model_fields and name != "kind"}
        own = pictures if "pictures" not in self.model_fields_set else self.pictures
        if "merge" in self.model_fields_set:
            shape["merge"] = self.merge
        merge = shape.pop("merge")
        shape["merge"] = None if merge is None else merge.model_dump()
        return type(self).model_validate(self.model_dump() | shape | {"pictures": own.model_dump()})

    @property
    def stop(self) -> int:
        """Number of blocks that run."""
        depth = self.depth or 0
        return self.layer if self.layer >= 0 else depth + 1 + self.layer

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        vit = self.vit()
        side = vit.image_size // vit.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """Tokens that are read of a picture."""
        return self.vit().left(self.stop) - (self.class_token and self.drop_class)

    def preprocess(self) -> Preprocess:
        own = self.pictures
        return Preprocess(self.vit().image_size, own.resize, own.interpolation, own.mean, own.std)


class PrefixOptions(Options):
    """The visual tokens take the place of the placeholder in the row (LLaVA, nvlm form D)."""

    kind: Literal["prefix"] = "prefix"


class CrossAttentionOptions(Options):
    """Gated blocks between the decoder's layers attend the visual tokens (nvlm form X, flamingo)."""

    kind: Literal["cross-attention"] = "cross-attention"
    every: int = Field(gt=0, description="one gated block after this many decoder blocks")


class HybridOptions(Options):
    """The thumbnail takes the place of its placeholder; gated blocks attend the tiles, each behind the embeddings of its
    tag, and neither tiles nor their tags have a position in the row (nvlm form H)."""

    kind: Literal["hybrid"] = "hybrid"
    every: int = Field(gt=0, description="one gated block after this many decoder blocks")


FusionOptions = Annotated[PrefixOptions | CrossAttentionOptions | HybridOptions, Field(discriminator="kind")]
