"""Run a bundle without torch: numpy, onnxruntime, tokenizers and Pillow only.

The names below are imported when first used, so that a data worker which only decodes pictures never loads
onnxruntime.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm.runtime.bundle import Bundle, LanguageBundle, VisionLanguageBundle, open_any_bundle, open_bundle
    from vlm.runtime.embedder import Embedder, Picture, PreparingEmbedder, probabilities, scores
    from vlm.runtime.manifest import is_bundle

_HOME = {
    "Bundle": "bundle",
    "LanguageBundle": "bundle",
    "open_any_bundle": "bundle",
    "open_bundle": "bundle",
    "Embedder": "embedder",
    "Picture": "embedder",
    "PreparingEmbedder": "embedder",
    "probabilities": "embedder",
    "scores": "embedder",
    "VisionLanguageBundle": "bundle",
    "is_bundle": "manifest",
}

__all__ = [
    "Bundle",
    "Embedder",
    "LanguageBundle",
    "Picture",
    "PreparingEmbedder",
    "VisionLanguageBundle",
    "is_bundle",
    "open_any_bundle",
    "open_bundle",
    "probabilities",
    "scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
