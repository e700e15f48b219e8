"""From a decoded picture to the pixels that a model sees.

The settings are written in the Hugging Face `preprocessor_config.json` form, so that `transformers` gives the same
pixel values from the same picture. S is the side of the model's input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlm.config.errors import DataError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

Resize = Literal["shortest", "squash", "pad"]
Interpolation = Literal["bilinear", "bicubic"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_LARGEST_INTERMEDIATE = 1 << 24
"""Pixels: a longer resized picture (an extreme aspect ratio) is cropped while it is resized, to bound memory."""

_IGNORED = {
    "image_processor_type",
    "feature_extractor_type",
    "processor_class",
    "do_convert_rgb",
    "_valid_processor_keys",
    "return_tensors",
    "data_format",
    "input_data_format",
    "default_to_square",
    "device",
    "disable_grouping",
    "image_seq_length",
    "_processor_class",
    "auto_map",
}
"""Fields of preprocessor_config.json that do not change the pixels here."""


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes S x S pixels.

    resize: `shortest` scales the shorter side to S and crops the centre (CLIP); `squash` scales both sides to S
    (SigLIP); `pad` scales the longer side to S and pads with black around the centre.
    interpolation: Pillow's antialiased filter. mean, std: per channel, of values in 0..1.
    """

    size: int
    resize: Resize = "shortest"
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"Preprocess.size is {self.size}, expected at least 1")
        if min(self.std) <= 0:
            raise ValueError(f"Preprocess.std is {self.std}, expected positive numbers")

    @property
    def resampling(self) -> Image.Resampling:
        return _RESAMPLING[self.interpolation]

    def to_array(self, picture: Image.Image) -> np.ndarray:
        """uint8 [3, S, S] of an RGB picture (`decode_picture` gives one)."""
        if picture.mode != "RGB":
            raise ValueError(f"Preprocess.to_array takes RGB pictures, got mode {picture.mode}")
        width, height = picture.size
        size = self.size
        if (width, height) == (size, size):
            pass
        elif self.resize == "squash":
            picture = picture.resize((size, size), self.resampling)
        elif self.resize == "shortest":
            picture = self._shortest(picture)
        else:
            scale = min(size / width, size / height)
            inner = (max(1, int(width * scale)), max(1, int(height * scale)))
            inside = picture.resize(inner, self.resampling)
            picture = Image.new("RGB", (size, size))
            picture.paste(inside, (ceil((size - inner[0]) / 2), ceil((size - inner[1]) / 2)))
        return np.asarray(picture).transpose(2, 0, 1).copy()

    def _shortest(self, picture: Image.Image) -> Image.Image:
        width, height = picture.size
        size, short = self.size, min(width, height)
        new_width = size if width == short else int(size * width / height)
        new_height = size if height == short else int(size * height / width)
        left, top = (new_width - size) // 2, (new_height - size) // 2
        if new_width * new_height > _LARGEST_INTERMEDIATE:
            sx, sy = width / new_width, height / new_height
            box = (left * sx, top * sy, min(width, (left + size) * sx), min(height, (top + size) * sy))
            return picture.resize((size, size), self.resampling, box=box)
        if (new_width, new_height) != (width, height):
            picture = picture.resize((new_width, new_height), self.resampling)
        return picture.crop((left, top, left + size, top + size))

    def normalise(self, pixels: np.ndarray) -> np.ndarray:
        """float32 (pixels / 255 - mean) / std of uint8 pixels [..., 3, H, W]."""
        mean = np.asarray(self.mean, np.float32)[:, None, None]
        std = np.asarray(self.std, np.float32)[:, None, None]
        return (pixels.astype(np.float32) / np.float32(255) - mean) / std

    def to_config(self) -> dict[str, Any]:
        """The fields of `preprocessor_config.json`; `transformers.AutoImageProcessor` reads them."""
        square = {"height": self.size, "width": self.size}
        size = {
            "shortest": {"shortest_edge": self.size},
            "squash": square,
            "pad": {"max_height": self.size, "max_width": self.size},
        }[self.resize]
        config: dict[str, Any] = {
            "image_processor_type": "SiglipImageProcessor"
            if self.resize == "squash"
            else "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": size,
            "resample": int(self.resampling),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
        }
        if self.resize != "squash":
            config |= {"do_center_crop": True, "crop_size": square}
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "preprocessor_config.json") -> Preprocess:
        """The settings in a `preprocessor_config.json` of the CLIP or SigLIP form.

        Raises DataError for a field that cannot be honoured here: what is read must give equal pixels.
        """

        def refuse(field: str, expected: str) -> DataError:
            return DataError(
                f"{field} = {config.get(field)!r} cannot be honoured: expected {expected}",
                where=where,
                remedy="prepare the pictures beforehand, or correct the field if the model was trained otherwise",
            )

        rest = set(config) - _IGNORED
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        if kind and not kind.startswith(("CLIP", "Siglip", "ViT")):
            raise DataError(
                f"image_processor_type {kind!r} is not supported",
                where=where,
                remedy="supported: CLIPImageProcessor, SiglipImageProcessor, ViTImageProcessor",
            )
        clip = kind.startswith("CLIP") or "crop_size" in config
        for field in ("do_resize", "do_rescale", "do_normalize"):
            rest.discard(field)
            if config.get(field, True) is not True:
                raise refuse(field, "true")
        rest.discard("rescale_factor")
        if abs(float(config.get("rescale_factor", 1 / 255)) - 1 / 255) > 1e-9:
            raise refuse("rescale_factor", "1/255")
        default = CLIP_MEAN, CLIP_STD
        if not clip:
            default = HALF, HALF
        mean, std = (
            _triple(config, "image_mean", default[0], refuse),
            _triple(config, "image_std", default[1], refuse),
        )
        names = {int(value): name for name, value in _RESAMPLING.items()}
        resample = config.get("resample", int(Image.Resampling.BICUBIC))
        if resample not in names:
            raise refuse("resample", "2 (bilinear) or 3 (bicubic)")
        size = config.get("size", 224)
        crop = config.get("do_center_crop", clip)
        rest -= {"image_mean", "image_std", "resample", "size", "do_center_crop", "crop_size"}
        if config.get("do_pad"):
            raise refuse("do_pad", "false")
        rest -= {"do_pad", "pad_size"}
        unknown = sorted(field for field in rest if config[field] not in (None, False))
        if unknown:
            raise refuse(unknown[0], "no such field")
        side, resize = _side(size, bool(crop), refuse)
        if crop and _square(config.get("crop_size", side)) != side:
            raise refuse("crop_size", f"{side} x {side}, as in size")
        return cls(side, resize, names[resample], mean, std)  # type: ignore[arg-type]


def _square(value: Any) -> int | None:
    """The side of a square size, or None."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Mapping) and value.get("height") == value.get("width"):
        side = value.get("height")
        return side if isinstance(side, int) and side > 0 else None
    return None


def _side(size: Any, crop: bool, refuse: Any) -> tuple[int, Resize]:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size, "shortest" if crop else "squash"
    if isinstance(size, Mapping):
        given = {name: value for name, value in size.items() if value is not None}
        keys = set(given)
        if keys == {"shortest_edge"} and crop and isinstance(given["shortest_edge"], int):
            return given["shortest_edge"], "shortest"
        if keys == {"height", "width"} and (side := _square(given)):
            return side, "squash"
        if keys == {"max_height", "max_width"} and crop and given["max_height"] == given["max_width"]:
            return given["max_height"], "pad"
    raise refuse("size", "a square height and width, or shortest_edge with do_center_crop")


def _triple(
    config: Mapping[str, Any], field: str, default: Sequence[float], refuse: Any
) -> tuple[float, float, float]:
    value = config.get(field, default)
    try:
        first, second, third = (float(v) for v in value)
    except (TypeError, ValueError):
        raise refuse(field, "three numbers") from None
    return first, second, third
