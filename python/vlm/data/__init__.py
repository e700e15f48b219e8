"""Data: sources, captions, packing, tokenizer, drawn scenes, the loader.

The names below are imported when they are asked for: worker processes import this package and need only what
decoding needs, which does not include torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.data.endless import Loader
    from vlm.data.loader import build_loader
    from vlm.data.options import DataOptions
    from vlm.data.samples import BadSample, Sample
    from vlm.data.sources.base import Source
    from vlm.data.sources.uri import open_source
    from vlm.data.texts import source_texts, texts_of
    from vlm.data.tokenizer import Tokenizer

_PLACES = {
    "BadSample": "vlm.data.samples",
    "DataOptions": "vlm.data.options",
    "Loader": "vlm.data.endless",
    "Sample": "vlm.data.samples",
    "Source": "vlm.data.sources.base",
    "Tokenizer": "vlm.data.tokenizer",
    "build_loader": "vlm.data.loader",
    "open_source": "vlm.data.sources.uri",
    "source_texts": "vlm.data.texts",
    "texts_of": "vlm.data.texts",
}

__all__ = [
    "BadSample",
    "DataOptions",
    "Loader",
    "Sample",
    "Source",
    "Tokenizer",
    "build_loader",
    "open_source",
    "source_texts",
    "texts_of",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
