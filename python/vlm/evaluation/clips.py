"""Clips before a torch model of clips: the prepared frames of each picture, and their stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlm.config.errors import RequestError
from vlm.runtime.film import frames_of, is_clip
from vlm.runtime.pictures import DEFAULT_LIMITS, PictureLimits, as_rgb, decode_picture

if TYPE_CHECKING:
    from vlm.runtime.preprocess import Preprocess
    from vlm.types import Pictures


def prepared(
    picture: Any, preprocess: Preprocess, frames: int | None, limits: PictureLimits | None = None
) -> NDArray[np.uint8]:
    """A picture or its bytes as uint8 [3, S, S], or as frames [k, 3, S, S] for a model of clips of at most `frames`.

    Raises BadPicture, and RequestError for a clip before a model of single pictures (frames is None).
    """
    if not isinstance(picture, Image.Image):
        picture = decode_picture(picture, limits or DEFAULT_LIMITS)
    if frames is None:
        if is_clip(picture):
            raise RequestError("this model reads one picture a sample, and the data have several (clips)", remedy='a tower of kind "video" reads clips')
        return preprocess.to_array(as_rgb(picture))
    return np.stack([preprocess.to_array(as_rgb(one)) for one in frames_of(picture, frames)])


def stream_of(pixels: Sequence[NDArray[np.uint8]]) -> Pictures:
    """Prepared pictures or clips as the rows of one stream, one sample each."""
    import torch

    from vlm.types import Pictures

    clips = [one if one.ndim == 4 else one[None] for one in pixels]
    counts = torch.tensor([len(one) for one in clips])
    values = torch.from_numpy(np.concatenate(clips))
    slot: Any = None
    if int(counts.max()) > 1:
        slot = torch.cat([torch.arange(int(count)) for count in counts])
    mask = torch.ones(len(values), dtype=torch.bool)
    return Pictures(values, mask, torch.repeat_interleave(torch.arange(len(clips)), counts), slot)
