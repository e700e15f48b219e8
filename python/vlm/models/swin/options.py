"""The table of a Swin tower."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, model_validator

from vlm.config.options import Options
from vlm.layers import Activation


@dataclass(frozen=True)
class StageShape:
    """One stage as it is built. side: of its map in patches; window, shift: of its blocks (shift of every second one)."""

    width: int
    depth: int
    heads: int
    side: int
    window: int
    shift: int
    pretrained_window: int


class SwinOptions(Options):
    """Stages of windowed blocks, the map halved and the channels doubled between two. The defaults are Swin V2's."""

    kind: Literal["swin"] = "swin"
    image_size: int = Field(gt=0, description="side of the picture in pixels")
    patch_size: int = Field(4, gt=0, description="side of a patch in pixels")
    width: int = Field(96, gt=0, description="channels of the first stage")
    depths: tuple[int, ...] = Field((2, 2, 6, 2), min_length=1, description="blocks of each stage")
    heads: tuple[int, ...] = Field((3, 6, 12, 24), min_length=1, description="attention heads of each stage")
    window: int = Field(8, gt=0, description="side of a window in positions; a smaller map is one window")
    pretrained_windows: tuple[int, ...] = Field(
        (), description="window of each stage in pre-training, by which offsets are scaled; 0 or none: the own one"
    )
    ffn_ratio: float = Field(4.0, gt=0, description="feed-forward width over width")
    activation: Activation = "gelu"
    qkv_bias: bool = Field(True, description="biases of queries and values; keys have none")
    norm: Literal["res-post", "pre"] = Field("res-post", description="res-post: at the end of each residual branch; pre: at its beginning")
    norm_zero_init: bool = Field(
        True, description="norms of residual branches begin at 0, so that a fresh block is the identity; res-post only"
    )
    main_norm_every: int = Field(0, ge=0, description="a norm on the main branch after every so many blocks; 0: none")
    norm_eps: float = Field(1e-5, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1, description="chance to skip the last block's branches; grows from 0 with depth")
    padding: Literal["masked", "attended"] = Field(
        "masked", description="positions beyond the edge of the map: masked, or attended as zeros (published checkpoints)"
    )
    mask_token: bool = Field(False, description="a learned token that stands for hidden patches (SimMIM)")

    @model_validator(mode="after")
    def _fits(self) -> SwinOptions:
        stages = len(self.depths)
        if len(self.heads) != stages or len(self.pretrained_windows) not in (0, stages):
            raise ValueError(f"{stages} depths, {len(self.heads)} heads, {len(self.pretrained_windows)} pretrained_windows: one a stage")
        if min(self.depths) < 1 or min(self.heads) < 1 or min(self.pretrained_windows, default=0) < 0:
            raise ValueError("depths and heads are at least 1, pretrained_windows at least 0")
        for stage in self.stages:
            if stage.width % stage.heads:
                raise ValueError(f"width {stage.width} of a stage is no multiple of its {stage.heads} heads")
            if stage.side < 1:
                raise ValueError(f"image_size {self.image_size} leaves nothing for {stages} stages of patches of {self.patch_size}")
        return self

    @property
    def stages(self) -> tuple[StageShape, ...]:
        out = []
        for number, (depth, heads) in enumerate(zip(self.depths, self.heads)):
            side = self.image_size // self.patch_size // 2**number
            window = min(self.window, side)
            shift = 0 if side <= self.window else self.window // 2
            trained = self.pretrained_windows[number] if self.pretrained_windows else 0
            out.append(StageShape(self.width * 2**number, depth, heads, side, window, shift, trained))
        return tuple(out)

    @property
    def out_width(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (len(self.depths) - 1)

    @property
    def stride(self) -> int:
        """Pixels between positions of the last stage."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def patches(self) -> int:
        """Positions of the last stage for a picture of `image_size`."""
        side = -(-self.image_size // self.patch_size)
        for _ in self.depths[1:]:
            side = (side + 1) // 2
        return side**2
